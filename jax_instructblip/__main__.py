"""The command line `jax-instructblip VERB ...`, or `python -m jax_instructblip VERB ...`.

VERB is a module of `jax_instructblip.commands`, `-` in place of `_`; only this module is imported.
"""

import ast
import contextlib
import difflib
import errno
import gc
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
    """Returns verb -> file for all modules of `commands` that define `main`."""
    files = {
        module.name.replace("_", "-"): Path(folder, f"{module.name}.py")
        for folder in commands.__path__
        for module in pkgutil.iter_modules([folder])
    }
    has_main = lambda path: "\ndef main(" in path.read_text(encoding="utf-8")
    return {name: path for name, path in files.items() if has_main(path)}


def usage() -> str:
    """Returns the text of `--help`: each verb with the first line of its module's docstring.

    The docstrings are parsed from the files; no verb is imported.
    """
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
    """Runs one verb; returns 0, 1 for an error the user can fix, 2 for wrong usage, 130 on Ctrl-C.

    An error that the user can fix is printed as one message. Any other is a bug and keeps its
    traceback. With `JAX_INSTRUCTBLIP_TRACEBACK=1` every error has its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal's encoding lacks is escaped: results are always printed.
        with contextlib.suppress(OSError):
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # a closed pipe raises here, not while Python exits
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
            _drop_output()  # stdout may be on the full disk
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
    tpu_compiler.set_flags()  # this and the next line must run before a verb imports JAX
    program_cache.set_default()
    # Importing and tracing make millions of objects that stay: looking for dead ones as often as
    # Python does takes a tenth of a short run.
    gc.set_threshold(50_000, 20, 50)
    return importlib.import_module(f"{commands.__name__}.{verbs[verb].stem}").main(rest)


def _sentence(error: Exception) -> str:
    """Returns the message to print for an error that the user can fix; "" for a bug.

    The user can fix errors of the system, errors raised by this package itself (not by a library
    that it calls), and lack of memory or too deep nesting of the input.
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
    """Escapes characters that would control a terminal, which file names may contain."""
    shown = lambda letter: letter.isprintable() or letter == "\n"
    return "".join(each if shown(each) else repr(each)[1:-1] for each in sentence)


def _is_exhausted(error: Exception) -> bool:
    """Returns True if JAX reports that a device or the compiler ran out of memory."""
    words = str(error)
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and any(
        each in words for each in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    )


def _drop_output() -> None:
    """Redirects stdout to /dev/null, so that Python does not fail to flush it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
