"""Trains the frozen towers of the embedded checkpoints, and puts the parts together.

`launch/backbones.sh` calls it: first `towers`, then (after the caption runs) `merge`.
"""

import argparse
from pathlib import Path

from jax_instructblip.backbones.sizes import LANGUAGE
from jax_instructblip.commands.flags import check_flags


def main(argv: list[str]) -> int:
    """Runs one of the two parts; returns 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip backbones", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    towers = parts.add_parser("towers", help="train vision tower and language models: WORK/base_*")
    towers.add_argument("work", type=Path, help="folder for what is made; finished parts are kept")
    towers.add_argument("--kinds", nargs="+", choices=tuple(LANGUAGE), default=list(LANGUAGE))
    towers.add_argument("--seed", type=int, default=0)
    towers.add_argument(
        "--scale", type=float, default=1.0, help="of all step counts (default: %(default)s)"
    )
    merge = parts.add_parser("merge", help="towers of BASE and Q-Former of RUN: OUT, replaced")
    merge.add_argument("base", type=Path)
    merge.add_argument("run", type=Path, help="run directory of the caption phase")
    merge.add_argument("out", type=Path)
    flags = parser.parse_args(argv)
    check_flags(flags)
    if flags.part == "merge":
        from jax_instructblip.backbones.build import replace_captioned

        replace_captioned(flags.base, flags.run, flags.out)
    else:
        from jax_instructblip.backbones.towers import train_towers

        train_towers(flags.work, flags.kinds, seed=flags.seed, scale=flags.scale)
    return 0
