"""Merges a run with the frozen base it was trained on into one self-contained checkpoint folder."""

import argparse
from pathlib import Path

from jax_instructblip.commands.flags import add_step, check_flags, without_accelerator


def main(argv: list[str]) -> int:
    """Merges as the flags say; returns 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip merge", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory, or one of its checkpoints/STEP")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    add_step(parser)
    args = parser.parse_args(argv)
    check_flags(args, stores=("run", "out"))
    without_accelerator()
    from jax_instructblip import merge

    merge(args.run, args.out, step=args.step, best=args.best)
    return 0
