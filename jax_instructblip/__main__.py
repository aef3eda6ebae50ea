"""`jax-instructblip VERB ...`, the same as `python -m jax_instructblip VERB ...`.

VERB is a module of `jax_instructblip.commands`; only that one is imported.
"""

import ast
import difflib
import importlib
import io
import os
import pkgutil
import sys
import traceback
from pathlib import Path

from jax_instructblip import commands, tpu_compiler

_PACKAGE = Path(__file__).parent


def find_verbs() -> dict[str, Path]:
    """Every verb and its file."""
    return {
        module.name: Path(folder, f"{module.name}.py")
        for folder in commands.__path__
        for module in pkgutil.iter_modules([folder])
    }


def usage() -> str:
    """The text of `--help`: each verb with the first line of its docstring, read, not imported."""
    verbs = find_verbs()
    width = max(map(len, verbs), default=0)
    lines = ["usage: jax-instructblip VERB ...", ""]
    for verb, path in verbs.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        summary = docstring.partition("\n")[0]
        lines.append(f"  {verb:{width}}  {summary}")
    return "\n".join([*lines, "", "`jax-instructblip VERB --help` lists its flags."])


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns 0, 1 for an error the user can mend, 2 for wrong usage, 130 on ^C.

    Such an error is printed as one line. Anything else is a defect and keeps its traceback;
    `JAX_INSTRUCTBLIP_TRACEBACK=1` shows the traceback always.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    verb, *rest = words
    verbs = find_verbs()
    if verb not in verbs:
        near = difflib.get_close_matches(verb, verbs, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(verbs)
        print(f"error: unknown verb {verb!r}; {hint}known: {known}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without a character shows its number: what was computed is printed.
        sys.stdout.reconfigure(errors="backslashreplace")
    tpu_compiler.set_flags()  # before JAX, which a verb imports, loads it
    try:
        code = importlib.import_module(f"{commands.__name__}.{verb}").main(rest)
        sys.stdout.flush()  # a reader that left is noticed here, not while the interpreter ends
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left (`| head`). What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get("JAX_INSTRUCTBLIP_TRACEBACK") == "1" or not _is_for_the_user(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _is_for_the_user(error: Exception) -> bool:
    """Whether it reports the world (OSError) or this package raised it, not a library below."""
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return _PACKAGE in Path(frames[-1].filename).parents


if __name__ == "__main__":
    sys.exit(main())
