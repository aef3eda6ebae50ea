"""Tunes the Q-Former (or other parts) as a config file says."""

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from jax_instructblip.evaluation import harness
from jax_instructblip.training import loop

# The configs of the repository share `configs/common.py`, whatever the working directory is.
_ROOT = Path(__file__).resolve().parents[2]

_USAGE = """usage: jax-instructblip train --config FILE [--config.FIELD=VALUE ...]

FILE is a Python file with get_config() (see configs/), FIELD any field of configs/common.py:
  jax-instructblip train --config configs/quickstart.py --config.workdir=runs/mine
  jax-instructblip train --config configs/custom_jsonl.py --config.optimizer.learning_rate=1e-4
A workdir that has checkpoints is taken up where the newest stands."""


def main(argv: list[str]) -> int:
    """Runs the training; returns 0."""
    if not argv or "--help" in argv or "-h" in argv:
        print(_USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    workdir = loop.run(read_config(argv), evaluate=harness.evaluate)
    print(f"trained: {workdir}")
    return 0


def read_config(argv: list[str]) -> ConfigDict:
    """The config that `--config FILE --config.FIELD=VALUE ...` describes.

    Raises:
        ValueError: an unknown flag or field, with the nearest name, or a value of the wrong type.
        OSError: the file cannot be read.
    """
    if str(_ROOT) not in sys.path and (_ROOT / "configs" / "common.py").is_file():
        sys.path.insert(0, str(_ROOT))
    own = flags.FlagValues()  # not absl's global ones: a process may call this twice
    words = ["train", *argv]
    config_flags.DEFINE_config_file(
        "config", help_string="config file", flag_values=own, lock_config=True, sys_argv=words
    )
    try:
        rest = own(words)
    except (AttributeError, KeyError) as error:
        raise ValueError(_unknown_field(argv) or f"in the config file: {error}") from error
    except flags.Error as error:
        raise ValueError(str(error)) from error
    if rest[1:]:
        raise ValueError(f"unexpected {' '.join(rest[1:])!r}: values are given as --FIELD=VALUE")
    if own["config"].value is None:
        raise ValueError("--config FILE is missing, for example --config configs/quickstart.py")
    return own["config"].value


def _unknown_field(argv: list[str]) -> str:
    """What is wrong with the first override of a field that the config has not; "" if none is."""
    known = list(_fields(read_config([word for word in argv if not word.startswith("--config.")])))
    for word in argv:
        name = word.removeprefix("--config.").partition("=")[0]
        if name != word.partition("=")[0] and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            last = name.rpartition(".")[2]
            near = near or [field for field in known if field.rpartition(".")[2] == last]
            hint = f"; did you mean config.{near[0]}?" if near else ""
            return f"unknown field config.{name}{hint} (configs/common.py has all of them)"
    return ""


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")
