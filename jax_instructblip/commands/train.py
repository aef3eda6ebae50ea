"""Trains the Q-Former (or other parts) as a config file says."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from jax_instructblip.commands.flags import check_flags
from jax_instructblip.parallel import membership
from jax_instructblip.training.config_file import load_config, parse_words

if TYPE_CHECKING:
    from ml_collections import ConfigDict

PROFILE_STEPS = 5

_HELP = """A workdir that has checkpoints is taken up where the newest stands. Ctrl-C or SIGTERM
saves and ends; a second Ctrl-C ends at once. Where an earlier run has left metrics and its
checkpoints are gone, FRESH=1 in the environment renames the metrics and starts over. Any field
of configs/common.py can be changed:

  jax-instructblip train --config configs/quickstart.py --config.workdir=runs/mine
  jax-instructblip train --config configs/custom_jsonl.py --config.optimizer.learning_rate=1e-4"""


def main(argv: list[str]) -> int:
    """Runs the training; returns 0, also after an early stop that has saved a checkpoint."""
    flags, _ = _parser().parse_known_args(argv)
    config = read_config(argv)
    fresh = os.environ.get("FRESH") == "1"
    from jax_instructblip import train
    from jax_instructblip.parallel.cluster import joined
    from jax_instructblip.training.checkpoints import is_writing

    try:
        print(f"run: {train(config, fresh=fresh, joined=joined(*membership.read_flags(flags)))}")
    except KeyboardInterrupt:
        if is_writing():  # Python would wait for that thread
            print("interrupted while a checkpoint was written, which is left out", file=sys.stderr)
            os._exit(130)
        raise
    return 0


def read_config(argv: list[str]) -> "ConfigDict":
    """Returns the config that `--config FILE --config.FIELD=VALUE ...` describes.

    Raises:
        ValueError: an unknown flag or field, with the nearest name, or a value of the wrong type.
        OSError: the file cannot be read.
    """
    flags, words = _parser().parse_known_args(argv)
    check_flags(flags, stores=("config",))
    config = parse_words(load_config(flags.config), words)
    if flags.profile:
        config.train.profile_folder = flags.profile
        config.train.profile_steps = config.train.profile_steps or PROFILE_STEPS
    return config


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
    membership.add_flags(parser)
    return parser
