"""Runs many `jax-instructblip` commands without importing the package for each.

    python -m tests.helpers.forked serve SOCKET           imports all, then forks for each command
    python -S tests/helpers/forked.py run SOCKET WORDS    one command, in a fork of the server

A command has the caller's folder, environment and open files. JAX reads its own variables when it
is imported: those of the server hold.
"""

import array
import contextlib
import json
import os
import socket
import sys

STREAMS = (0, 1, 2)


@contextlib.contextmanager
def server(environment):
    """Starts a server with these variables; yields the shell's words for `jax-instructblip`."""
    import shlex
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "socket")
        words = [sys.executable, "-m", "tests.helpers.forked", "serve", path]
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None and process.stdout.readline() == b"ready\n"
                yield shlex.join([sys.executable, "-S", __file__, "run", path])
            finally:
                process.kill()


def run(path: str, words: list[str]) -> int:
    """Has the server run a command; returns its exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        order = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
        files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", STREAMS))]
        connection.sendmsg([b"x"], files)
        with connection.makefile("rw") as stream:
            stream.write(json.dumps(order) + "\n")
            stream.flush()
            return int(stream.readline())


def serve(path: str) -> None:
    """Imports every verb, then answers until the process is killed."""
    import importlib
    import warnings

    from jax_instructblip.__main__ import find_verbs

    for verb in find_verbs():
        importlib.import_module(f"jax_instructblip.commands.{verb.replace('-', '_')}")
    importlib.import_module("jax_instructblip.inference.pipeline")
    importlib.import_module("jax_instructblip.training.loop")
    warnings.filterwarnings("ignore", message=".*fork")  # no thread of JAX's runs before a fork
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # those that have ended
                    pass


def _answer(connection: socket.socket) -> None:
    """Forks once more, runs the command there, and sends its exit status."""
    _, files, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(4 * len(STREAMS)))
    streams = array.array("i", files[0][2])
    with connection.makefile("rw") as stream:
        order = json.loads(stream.readline())
        child = os.fork()
        if child == 0:
            for target, source in zip(STREAMS, streams, strict=True):
                os.dup2(source, target)
            sys.exit(_run_here(order))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stream.write(f"{status}\n")
    os._exit(0)


def _run_here(order: dict) -> int:
    """Runs the command; its errors and its exit are those of any Python program."""
    from jax_instructblip.__main__ import main

    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.path[0] = order["folder"]
    sys.argv = ["jax-instructblip", *order["words"]]
    return main()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(run(sys.argv[2], sys.argv[3:]))
