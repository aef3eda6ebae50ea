"""Tunes the Q-Former (or other parts) as a config file says."""

import argparse
import difflib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from jax_instructblip.commands.flags import check_flags
from jax_instructblip.evaluation import validation
from jax_instructblip.evaluation.reports import curves
from jax_instructblip.parallel import cluster
from jax_instructblip.training import checkpoints, loop, setup
from jax_instructblip.training.config_fields import check_config

# The configs of the repository share `configs/common.py`, whatever the working directory is.
_ROOT = Path(__file__).resolve().parents[2]

PROFILE_STEPS = 5

_HELP = """A workdir that has checkpoints is taken up where the newest stands. Ctrl-C or SIGTERM
saves and ends; a second Ctrl-C ends at once. Where an earlier run has left metrics and its
checkpoints are gone, FRESH=1 in the environment renames the metrics and starts over. Any field
of configs/common.py can be changed:

  jax-instructblip train --config configs/quickstart.py --config.workdir=runs/mine
  jax-instructblip train --config configs/custom_jsonl.py --config.optimizer.learning_rate=1e-4"""


def main(argv: list[str]) -> int:
    """Runs the training; returns 0, also when it was told to stop and has saved."""
    flags, _ = _parser().parse_known_args(argv)
    config = read_config(argv)
    check_config(config, run=True)  # before the records to validate on are read, or drawn
    if (records := setup.read_validation_records(config)) is not None:
        validation.check(records, config.validation.path, config.validation.split)
    calls = {"evaluate": validation.evaluate, "report": curves.write}
    try:
        with cluster.joined(*cluster.read_flags(flags)):
            workdir = loop.run(config, **calls, fresh=os.environ.get("FRESH") == "1")
            print(f"run: {workdir}")
    except KeyboardInterrupt:
        if checkpoints.is_writing():  # Python would wait for that thread
            print("interrupted while a checkpoint was written, which is left out", file=sys.stderr)
            os._exit(130)
        raise
    return 0


def read_config(argv: list[str]) -> ConfigDict:
    """The config that `--config FILE --config.FIELD=VALUE ...` describes.

    Raises:
        ValueError: an unknown flag or field, with the nearest name, or a value of the wrong type.
        OSError: the file cannot be read.
    """
    given, overrides = _parser().parse_known_args(argv)
    check_flags(given)
    config = load_config(given.config)
    _refuse_unknown(config, overrides)
    own = absl_flags.FlagValues()  # not absl's global ones: a process may call this twice
    words = ["train", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=own, sys_argv=words)
        rest = own(words)
    except absl_flags.Error as error:
        raise ValueError(_short(str(error))) from error
    if rest[1:]:
        raise ValueError(f"unexpected {' '.join(rest[1:])!r}: values are given as --FIELD=VALUE")
    config = own["config"].value
    assert config is not None
    if given.profile:
        config.train.profile_folder = given.profile
        config.train.profile_steps = config.train.profile_steps or PROFILE_STEPS
    return config


def _short(message: str) -> str:
    """The message without the middle of a value of thousands of letters."""
    return message if len(message) <= 400 else f"{message[:200]} ... {message[-200:]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip train",
        usage="%(prog)s --config FILE [--config.FIELD=VALUE ...]",
        description=__doc__,
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="has get_config()")
    parser.add_argument(
        "--profile",
        metavar="DIR",
        default="",
        help=f"write a trace there, of {PROFILE_STEPS} steps or config.train.profile_steps",
    )
    cluster.add_flags(parser)
    return parser


def load_config(path: str) -> ConfigDict:
    """The config that `get_config()` of the file returns.

    Raises:
        ValueError: the file has no such function, or it sets a field that there is not.
        OSError: the file cannot be read.
    """
    if str(_ROOT) not in sys.path and (_ROOT / "configs" / "common.py").is_file():
        sys.path.insert(0, str(_ROOT))
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file {path} (those of this project are in configs/)")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file: a config is one, with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = getattr(module, "get_config", None)
        config = made() if callable(made) else None
    except Exception as error:  # the file is a program of the user's; fields and types besides
        raise ValueError(f"{_place(path, error)}: {type(error).__name__}: {error}") from error
    if made is None:
        raise ValueError(f"{path} has no get_config(): see configs/custom_jsonl.py for one")
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"{path}: get_config() returns a {type(config).__name__}, expected the ConfigDict of "
            "common.get_config() with some fields changed: is `return config` missing?"
        )
    return config


def _place(path: str, error: Exception) -> str:
    """FILE:LINE of the config's own line that an error came from."""
    own = Path(path).absolute()
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).absolute() == own]
    return f"{path}:{lines[-1]}" if lines else path


def _refuse_unknown(config: ConfigDict, overrides: list[str]) -> None:
    """Raises a ValueError that lists every override of a field that the config has not."""
    known, wrong = list(_fields(config)), []
    for word in overrides:
        name = word.lstrip("-").removeprefix("config.").partition("=")[0]
        if not word.startswith("--config.") or name in known:
            continue
        last = [field for field in known if field.rpartition(".")[2] == name.rpartition(".")[2]]
        near = difflib.get_close_matches(name, known, n=1) or last
        hint = f"; did you mean config.{near[0]}?" if near else ""
        wrong.append(f"unknown field config.{name}{hint}")
    if wrong:
        raise ValueError("\n  ".join(["configs/common.py has all fields:", *wrong]))


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")
