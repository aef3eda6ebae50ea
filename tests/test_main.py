import concurrent.futures.process
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import jax_instructblip
from jax_instructblip import __main__ as cli
from jax_instructblip import commands
from tests.helpers.interpreter import run_python


@pytest.fixture
def verbs(tmp_path, monkeypatch):
    """Replaces the verbs by those written with `verbs(name="source of main")`."""
    monkeypatch.setattr(commands, "__path__", [str(tmp_path)])

    def write(**bodies: str) -> None:
        for name, body in bodies.items():
            source = f'"""Does {name}.\n\nMore.\n"""\n\ndef main(argv):\n    {body}\n'
            (tmp_path / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, f"{commands.__name__}.{name}", raising=False)

    yield write
    for module in tmp_path.glob("*.py"):
        sys.modules.pop(f"{commands.__name__}.{module.stem}", None)


def test_runs_the_verb_with_the_words_after_it(verbs, capsys):
    verbs(greet="print(argv); return 7")
    assert cli.main(["greet", "--loud", "you"]) == 7
    assert capsys.readouterr().out == "['--loud', 'you']\n"


def test_a_verb_of_two_words_has_a_hyphen(verbs, capsys):
    verbs(say_it="print(argv); return 0")
    assert cli.main(["say-it", "loud"]) == 0 and cli.main(["say_it"]) == 2
    assert capsys.readouterr().out == "['loud']\n"


def test_help_lists_every_verb_without_importing_one(verbs, tmp_path, capsys):
    verbs(greet="return 0", wave="return 0")
    with (tmp_path / "wave.py").open("a") as module:
        module.write("raise RuntimeError('imported')\n")
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "  greet  Does greet.\n  wave   Does wave.\n" in out
    assert "More" not in out


# Each takes from a tenth of a second to several seconds of processor time to import.
SLOW = (
    "jax",
    "flax",
    "optax",
    "orbax",
    "transformers",
    "tensorflow_datasets",
    "grain",
    "matplotlib",
    "openai",
)
SLOW += ("ml_collections",)


@pytest.mark.parametrize("verb", cli.find_verbs())
def test_help_and_wrong_usage_import_no_slow_library(verb):
    """Names the slow libraries themselves: a clock would not say the same each time."""
    said = run_python(f"""
        import sys
        from jax_instructblip.__main__ import main
        for word in ("--help", "--no_such_flag"):
            try:
                main([{verb!r}, word])
            except SystemExit as left:
                print("left with", left.code)
        print("imported:", *sorted(set({SLOW!r}) & set(sys.modules)))
    """)
    assert said.startswith("usage: jax-instructblip ")
    assert [line for line in said.splitlines() if line.startswith("left with")] == [
        *("left with 0", "left with 2")
    ]
    assert said.endswith("\nimported:\n")


def test_what_verbs_share_is_no_verb():
    assert (Path(commands.__file__).parent / "flags.py").is_file()
    assert "flags" not in cli.find_verbs()


def test_only_the_verb_asked_for_is_imported(verbs, tmp_path):
    verbs(greet="return 0", wave="return 0")
    with (tmp_path / "wave.py").open("a") as module:
        module.write("raise RuntimeError('imported')\n")
    assert cli.main(["greet"]) == 0
    with pytest.raises(RuntimeError, match="imported"):
        cli.main(["wave"])


def test_no_verb_shows_the_usage_on_stderr(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: jax-instructblip VERB")


def test_unknown_verb_suggests_the_nearest(verbs, capsys):
    verbs(greet="return 0", wave="return 0")
    assert cli.main(["great"]) == 2
    message = "error: unknown verb 'great'; did you mean 'greet'? known: greet, wave\n"
    assert capsys.readouterr().err == message
    assert cli.main(["xyz"]) == 2
    assert capsys.readouterr().err == "error: unknown verb 'xyz'; known: greet, wave\n"


# A verb stands outside the package in these tests, so "raised by this package" needs a function
# of the package that raises.
DELIBERATE = "from jax_instructblip.models.released import get_variant; get_variant('nobody')"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("open('/nowhere/photo.jpg')", "/nowhere/photo.jpg"),
        (DELIBERATE, "error: unknown variant 'nobody'"),
    ],
)
def test_an_error_for_the_user_is_one_line(verbs, capsys, monkeypatch, body, message):
    monkeypatch.delenv("JAX_INSTRUCTBLIP_TRACEBACK", raising=False)
    verbs(fail=body)
    assert cli.main(["fail"]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_variable_keeps_the_traceback(verbs, monkeypatch):
    monkeypatch.setenv("JAX_INSTRUCTBLIP_TRACEBACK", "1")
    verbs(fail=DELIBERATE)
    with pytest.raises(ValueError, match="nobody"):
        cli.main(["fail"])


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("len(3)", TypeError),
        ("{}['key']", KeyError),
        ("import jax_instructblip; jax_instructblip.laod", AttributeError),  # raised by the package
        ("import numpy; numpy.zeros(2).reshape(3)", ValueError),
    ],
)
def test_a_defect_keeps_its_traceback(verbs, body, error):
    verbs(fail=body)
    with pytest.raises(error):
        cli.main(["fail"])


def test_interrupt_ends_with_130(verbs, capsys):
    verbs(wait="raise KeyboardInterrupt")
    assert cli.main(["wait"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def _run(body: str, *words: str, **options) -> subprocess.Popen:
    """`python -m jax_instructblip WORDS`, after the Python of `body`."""
    code = f"import runpy, sys\n{body}\nsys.argv[1:] = {list(words)!r}\n"
    code += "runpy.run_module('jax_instructblip', run_name='__main__', alter_sys=True)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, "-c", code], text=True, env=environment, **options)


def test_as_a_program():
    with _run("", "nonsense", stderr=subprocess.PIPE) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: unknown verb 'nonsense'")


@pytest.mark.parametrize("words", [1, 10_000])
def test_a_reader_that_leaves_costs_no_traceback(tmp_path, words):
    (tmp_path / "talk.py").write_text(
        "import sys\ndef main(argv):\n    print('ready', flush=True)\n    sys.stdin.read()\n"
        f"    for _ in range({words}):\n        print('word')\n    return 0\n"
    )
    body = f"from jax_instructblip import commands; commands.__path__ = [{str(tmp_path)!r}]"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with _run(body, "talk", **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == "ready\n"
        process.stdout.close()
        process.stdin.close()  # lets it write the rest
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupted_program(tmp_path):
    (tmp_path / "wait.py").write_text(
        "import time\ndef main(argv):\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    body = f"from jax_instructblip import commands; commands.__path__ = [{str(tmp_path)!r}]"
    # A shell's background job ignores SIGINT and hands that down: this test must not depend on it.
    body += "; import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with _run(body, "wait", **pipes) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_output_that_a_terminal_cannot_show_is_printed_all_the_same(tmp_path, encoding):
    (tmp_path / "talk.py").write_text(
        "from jax_instructblip.files import json_line\n"
        "def main(argv):\n"
        "    text = '\\u7ea2 \\U0001f534 \\xe4'\n"
        "    print(json_line({'a': text}), text + ' \\ud800', sep='\\n')\n"
        "    return 0\n"
    )
    body = f"from jax_instructblip import commands; commands.__path__ = [{str(tmp_path)!r}]\n"
    body += f"sys.stdout.reconfigure(encoding={encoding!r}, errors='strict')"
    with _run(body, "talk", stdout=subprocess.PIPE, encoding=encoding) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    line, text = out.splitlines()
    assert json.loads(line) == {"a": "\u7ea2 \U0001f534 \xe4"}
    shown = {"ascii": "\\u7ea2 \\U0001f534 \\xe4", "latin-1": "\\u7ea2 \\U0001f534 \xe4"}
    assert text == shown.get(encoding, "\u7ea2 \U0001f534 \xe4") + " \\ud800"


class JaxRuntimeError(RuntimeError):
    """Named as what XLA raises."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory: ask for less at once"),
        (MemoryError("Unable to allocate 9 TiB"), "out of memory (Unable to allocate 9 TiB): ask"),
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: 9 TiB\nmore"),
            "out of memory (RESOURCE_EXHAUST",
        ),
        (JaxRuntimeError("INTERNAL: Out of memory"), "out of memory (INTERNAL: Out of memory)"),
        (RecursionError("maximum"), "what was given is nested too deeply"),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
            "a text cannot be read or written: ",
        ),
        (OSError(28, "No space left on device", "a"), "[Errno 28] No space left on device: 'a'"),
    ],
)
def test_whatever_a_user_can_cause_is_one_line(monkeypatch, capsys, error, message):
    def fail(argv):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.setattr(cli, "_drop_output", lambda: None)
    assert cli.main(["verb"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}") and shown.count("\n") == 1


@pytest.mark.parametrize("error", [JaxRuntimeError("INTERNAL: a bug"), RuntimeError("a bug")])
def test_other_errors_of_the_run_time_keep_their_traceback(monkeypatch, error):
    def fail(argv):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(type(error), match="a bug"):
        cli.main(["verb"])


@pytest.mark.parametrize("words", [["--help"], ["talk", "--help"]])
def test_help_whose_reader_left_costs_no_traceback(tmp_path, words):
    (tmp_path / "talk.py").write_text(
        "import argparse\ndef main(argv):\n    argparse.ArgumentParser(prog='x').parse_args(argv)\n"
    )
    body = f"from jax_instructblip import commands; commands.__path__ = [{str(tmp_path)!r}]\n"
    body += "import os; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)"
    with _run(body, *words, stderr=subprocess.PIPE) as process:
        assert process.stderr and process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is not there")
def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        with _run("", "--help", stdout=full, stderr=subprocess.PIPE) as process:
            assert process.stderr
            assert process.stderr.read() == "error: [Errno 28] No space left on device\n"
    assert process.returncode == 1


def test_a_worker_that_was_ended_is_one_line(monkeypatch, capsys):
    def run(words):
        raise concurrent.futures.process.BrokenProcessPool("terminated abruptly")

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["any"]) == 1
    assert "error: a process that worked for this one has ended" in capsys.readouterr().err


def test_a_name_that_would_steer_the_terminal_is_written_out(monkeypatch, capsys):
    def run(words):
        raise OSError("a\x1b[2Jb\r\0\ud800: no such file\n  in the second line, é 字")

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["any"]) == 1
    said = "error: a\\x1b[2Jb\\r\\x00\\ud800: no such file\n  in the second line, é 字\n"
    assert capsys.readouterr().err == said


def test_versions_are_told_of_an_installed_package_and_of_a_checkout(capsys, monkeypatch):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jax_instructblip 0.")

    def nobody_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", nobody_installed)
        assert jax_instructblip.__version__ == "unknown"
