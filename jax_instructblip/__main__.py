"""`jax-instructblip VERB ...`, the same as `python -m jax_instructblip VERB ...`.

VERB is a module of `jax_instructblip.commands`; only that one is imported.
"""

import ast
import contextlib
import difflib
import errno
import importlib
import importlib.metadata
import io
import os
import pkgutil
import sys
import traceback
from concurrent.futures import BrokenExecutor
from pathlib import Path

import jax_instructblip
from jax_instructblip import commands, program_cache, tpu_compiler

_PACKAGE = Path(__file__).parent


def find_verbs() -> dict[str, Path]:
    """Every verb and its file: the modules that have a `main`."""
    files = {
        module.name: Path(folder, f"{module.name}.py")
        for folder in commands.__path__
        for module in pkgutil.iter_modules([folder])
    }
    has_main = lambda path: "\ndef main(" in path.read_text(encoding="utf-8")
    return {name: path for name, path in files.items() if has_main(path)}


def usage() -> str:
    """The text of `--help`: each verb with the first line of its docstring, read, not imported."""
    verbs = find_verbs()
    width = max(map(len, verbs), default=0)
    lines = ["usage: jax-instructblip VERB ...", ""]
    for verb, path in verbs.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        summary = docstring.partition("\n")[0]
        lines.append(f"  {verb:{width}}  {summary}")
    return "\n".join(
        [*lines, "", "`jax-instructblip VERB --help` lists its flags; `--version` says versions."]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns 0, 1 for an error the user can mend, 2 for wrong usage, 130 on ^C.

    Such an error is printed as one line. Anything else is a defect and keeps its traceback;
    `JAX_INSTRUCTBLIP_TRACEBACK=1` shows the traceback always.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without a character shows its number: what was computed is printed.
        with contextlib.suppress(OSError):
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # a reader that left is noticed here, not while Python ends
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left (`| head`)
        _drop_output()
        return 1
    except (ValueError, OSError, MemoryError, RecursionError, RuntimeError) as error:
        sentence = _sentence(error)
        if os.environ.get("JAX_INSTRUCTBLIP_TRACEBACK") == "1" or not sentence:
            raise
        print(f"error: {_printable(sentence)}", file=sys.stderr)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _drop_output()  # it may be what is full
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        own = jax_instructblip.__version__
        print(f"jax_instructblip {own}, jax {importlib.metadata.version('jax')}")
        return 0
    verb, *rest = words
    verbs = find_verbs()
    if verb not in verbs:
        near = difflib.get_close_matches(verb, verbs, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(verbs)
        print(f"error: unknown verb {verb!r}; {hint}known: {known}", file=sys.stderr)
        return 2
    tpu_compiler.set_flags()  # both before JAX, which a verb imports
    program_cache.set_default()
    return importlib.import_module(f"{commands.__name__}.{verb}").main(rest)


def _sentence(error: Exception) -> str:
    """The sentence for an error that reports the world or what was given; "" for others.

    Those are errors of the system, errors that this package raised (not a library below), and
    whatever takes more memory or nesting than there is.
    """
    if isinstance(error, MemoryError) or _is_exhausted(error):
        first = (str(error).splitlines() or [""])[0]
        return (
            f"out of memory{first and f' ({first[:200]})'}: ask for less at once (a smaller batch, "
            "fewer beams, shorter texts), or take a larger machine"
        )
    if isinstance(error, BrokenExecutor):
        return (
            "a process that worked for this one has ended, most likely for want of memory: take "
            "fewer of them (--workers, config.data.workers)"
        )
    if isinstance(error, RecursionError):
        return (
            "what was given is nested too deeply to be read (JAX_INSTRUCTBLIP_TRACEBACK=1 shows "
            "where)"
        )
    if isinstance(error, OSError):
        return str(error)
    if isinstance(error, UnicodeError):
        return f"a text cannot be read or written: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = isinstance(error, ValueError) and _PACKAGE in Path(frames[-1].filename).parents
    return str(error) if ours else ""


def _printable(sentence: str) -> str:
    """The sentence with characters that would steer a terminal written out, as in file names."""
    shown = lambda letter: letter.isprintable() or letter == "\n"
    return "".join(each if shown(each) else repr(each)[1:-1] for each in sentence)


def _is_exhausted(error: Exception) -> bool:
    """Tells whether a device or the compiler had no memory for what was asked."""
    words = str(error)
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and any(
        each in words for each in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    )


def _drop_output() -> None:
    """Discards buffered output: Python would try to write it once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
