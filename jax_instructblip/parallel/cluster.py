"""Runs of several processes: how they meet, agree on errors, and stop together on preemption.

A `Cluster` (`membership.py`) is the place of one process in its run:

    Cluster --> rendezvous, which names absent processes --> jax.distributed --> one mesh of all
"""

import atexit
import contextlib
import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_instructblip.parallel import peers
from jax_instructblip.parallel.membership import AUTO, Cluster, ClusterError

RETRY_SECONDS = 0.2
_GREETING = "jax_instructblip"  # first word of a message: other programs may use the port


@contextlib.contextmanager
def joined(
    cluster: Cluster | None, limit: float = 300.0, silence_limit: float = peers.LIMIT
) -> Iterator[None]:
    """A context in which this process is part of its run; does nothing if `cluster` is None.

    Waits up to `limit` seconds for the other processes, then prints this process's number and
    devices to stderr. If another process is lost inside the context, that is, killed or silent for
    `silence_limit` seconds, this one reports the loss and ends (`peers.py`; on a TPU pod JAX
    notices, and aborts). If this process fails, the others are told.

    Raises:
        ClusterError: not all processes came within `limit`; the message names the absent ones.
    """
    if cluster is None:
        yield
        return
    watch = None
    # JAX's limit is longer, so that `peers.py` notices a loss first: JAX would abort.
    kwargs: dict[str, Any] = {
        "initialization_timeout": int(limit),
        "heartbeat_timeout_seconds": math.ceil(2 * silence_limit),
    }
    if cluster.coordinator != AUTO:
        lines = rendezvous(cluster, limit)
        me = f"process {cluster.index} on {socket.gethostname()}"
        watch = peers.Peers(lines, me, silence_limit)
        kwargs["coordinator_address"] = cluster.coordinator
        kwargs["num_processes"], kwargs["process_id"] = cluster.count, cluster.index
    try:
        jax.distributed.initialize(**kwargs)
        me = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
        devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
        print(f"{me}: {devices} ({jax.devices()[0].device_kind})", file=sys.stderr, flush=True)
        yield
    except BaseException as error:
        # While the interpreter ends, JAX would wait for the others, and they for this process.
        atexit.register(_leave)
        if watch is not None:
            watch.fail(f"{type(error).__name__}: {error}")
        raise
    jax.distributed.shutdown()
    if watch is not None:
        watch.close()


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def rendezvous(cluster: Cluster, limit: float) -> peers.Lines:
    """Connects all processes of a run and returns the open connections by process (`peers.Lines`).

    Process 0 gets a connection to each of the others, and each of them one to process 0. They meet
    here first because JAX, when it has waited too long, ends a process without saying who is
    absent.

    Raises:
        ClusterError: some are absent after `limit` seconds, or two have the same number. All
            processes that are present raise the error.
    """
    deadline = time.monotonic() + limit
    if cluster.index:
        return {0: (_answer(cluster, deadline, limit), cluster.rendezvous_address()[0])}
    return _call(cluster, deadline, limit)


def _call(cluster: Cluster, deadline: float, limit: float) -> peers.Lines:
    """Process 0's part of `rendezvous`: accepts the others, then tells all of them the outcome.

    Returns the connections by process. `deadline` is a time of `time.monotonic`, `limit` the
    seconds waited until then, for the error text. A ClusterError as in `rendezvous`.
    """
    here: dict[int, tuple[socket.socket, str]] = {}
    problem = ""
    with _listen(cluster.rendezvous_address()[1]) as listener, contextlib.ExitStack() as stack:
        while len(here) < cluster.count - 1 and not problem:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, address = listener.accept()
            except TimeoutError:
                absent = sorted(set(range(1, cluster.count)) - here.keys())
                problem = (
                    f"after {limit:g} seconds {len(here) + 1} of {cluster.count} processes are "
                    f"here, absent: {', '.join(map(str, absent))}; here: 0 on "
                    + "".join(
                        [socket.gethostname(), *(f", {i} on {here[i][1]}" for i in sorted(here))]
                    )
                )
                break
            stack.enter_context(connection)
            problem = _receive(cluster, connection, here) or problem
            if connection not in (known for known, _ in here.values()):
                connection.close()
        for connection, _ in here.values():
            with contextlib.suppress(OSError):  # the process has left again: JAX will notice
                connection.sendall(
                    f"{_GREETING} {problem}".strip().encode("utf-8", "backslashreplace") + b"\n"
                )
        if problem:
            raise ClusterError(problem)
        stack.pop_all()  # the connections stay open
    return here


def _receive(
    cluster: Cluster, connection: socket.socket, here: dict[int, tuple[socket.socket, str]]
) -> str:
    """Adds the process at the other end to `here`; returns what is wrong with it, or ""."""
    connection.settimeout(5.0)
    try:
        words = connection.makefile().readline().split()
    except OSError:
        words = []
    if len(words) != 4 or words[0] != _GREETING:
        return ""  # somebody else knocked at this port
    count, index, host = int(words[1]), int(words[2]), words[3]
    if count != cluster.count:
        problem = f"process {index} on {host} was told of {count} processes, not {cluster.count}"
    elif index in here or index == 0:
        other = here[index][1] if index in here else socket.gethostname()
        problem = f"two processes say that they are process {index}: on {other} and on {host}"
    else:
        here[index] = connection, host
        return ""
    here[-1] = connection, host  # under an unused number, so that it is told of the problem, too
    return problem


def _answer(cluster: Cluster, deadline: float, limit: float) -> socket.socket:
    """The other processes' part of `rendezvous`: reports to process 0 and awaits its reply.

    Returns the open connection. `deadline` is a time of `time.monotonic`, `limit` the seconds
    waited until then, for the error text. A ClusterError if process 0 is absent or says why the
    run cannot start.
    """
    address, problem = cluster.rendezvous_address(), "nobody answers"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection(address, deadline - time.monotonic())
        except OSError:
            time.sleep(RETRY_SECONDS)
            continue
        # 10 seconds more: process 0 gives up by its own clock, and then says so.
        answer = _report(cluster, connection, deadline - time.monotonic() + 10.0)
        if answer == _GREETING:
            return connection
        connection.close()
        if answer.startswith(_GREETING):
            raise ClusterError(answer.removeprefix(_GREETING).strip())
        if not answer:
            raise ClusterError(
                f"process 0 at {address[0]}:{address[1]} ended before all processes had come: its "
                "own output says why"
            )
        problem = f"somebody else answers ({answer[:80]!r})"
        time.sleep(RETRY_SECONDS)
    raise ClusterError(
        f"process {cluster.index}: {problem} at {address[0]}:{address[1]} after {limit:g} seconds; "
        "absent: 0 (is its host right, is the port open?)"
    )


def _report(cluster: Cluster, connection: socket.socket, limit: float) -> str:
    """Sends this process's number and host to process 0; returns its reply, a line of text.

    Returns "" if there is none within `limit` seconds, or the other end closes.
    """
    connection.settimeout(limit)
    word = f"{_GREETING} {cluster.count} {cluster.index} {socket.gethostname()}\n"
    try:
        connection.sendall(word.encode())
        with connection.makefile(errors="replace") as lines:
            return lines.readline().strip()
    except OSError:
        return ""


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise ClusterError(
            f"port {port} of {socket.gethostname()} cannot be used ({error.strerror}): choose "
            "another for --coordinator"
        ) from error


def agree(problem: Exception | None) -> None:
    """Raises in every process if any process has a `problem`; all call this at the same point.

    Raises:
        Exception: this process's own `problem`.
        ClusterError: only other processes have a problem; the message names them.
    """
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(problem is not None))
        if problem is None and failed.any():
            names = ", ".join(map(str, np.flatnonzero(failed)))
            raise ClusterError(f"process {names} cannot go on: its own output says why")
    if problem is not None:
        raise problem


def own_rows(count: int) -> list[int]:
    """Returns the indices, below `count`, of rows that this process computes for `gather_rows`.

    Every process has equally many. Where `count` cannot be divided, the last row is repeated.
    """
    share = -(-count // jax.process_count())
    first = jax.process_index() * share
    return [min(row, count - 1) for row in range(first, first + share)]


def gather_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns all `count` rows `[count, ...]`; `rows` are those of this process's `own_rows`.

    All processes call this at the same point.
    """
    if jax.process_count() == 1:
        return rows
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))[:count]


class Watchdog:
    """Prints the stacks of all threads if `alive` is not called for `limit` seconds.

    A process that waits for another one hangs silently; its stack shows in which call. The process
    is not ended, because the other one may come back.
    """

    def __init__(self, limit: float):
        """Takes the limit in seconds; the watch starts at the first call of `alive`."""
        self._limit = limit

    def alive(self) -> None:
        """Tells the watchdog that the process makes progress; the time starts again at 0."""
        if sys.__stderr__ is not None:  # sys.stderr may be no file, in a notebook
            faulthandler.dump_traceback_later(self._limit, file=sys.__stderr__)

    def close(self) -> None:
        """Stops the watchdog; no stacks are printed any more."""
        faulthandler.cancel_dump_traceback_later()


class Preemption:
    """Notices SIGTERM or Ctrl-C, sent to this process or to any other process of its run.

    A cluster sends SIGTERM before it takes machines back. All processes learn of the signal at the
    same step, a little later, so that they save the same state. A second Ctrl-C interrupts at once.
    """

    def __init__(self):
        """Installs handlers of SIGTERM and Ctrl-C; with several processes JAX handles SIGTERM."""
        self._ordered, self._before = False, {}
        self._alone = jax.process_count() == 1
        # Python allows handlers in the main thread only; elsewhere the signals keep theirs.
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if self._alone:
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._take)

    def _take(self, number: int, frame: object) -> None:
        del number, frame
        self._ordered = True

    def _interrupt(self, number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(OSError):  # not `print`, in which this may have come
            os.write(2, b"\nCtrl-C: saving, then ending. Once more: ending now, without a save\n")
        if self._alone:
            self._take(number, frame)
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # for JAX, which tells the others

    def reached(self, step: int) -> bool:
        """True if the run must stop after `step`; the answer is the same in every process.

        All processes call this for every step.
        """
        return self._ordered if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Restores the earlier signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
