"""Exports a checkpoint folder or a tuned run to a folder that stock transformers loads."""

import argparse
from pathlib import Path

from jax_instructblip.commands.flags import add_step, check_flags, without_accelerator
from jax_instructblip.conversion.safetensors import SHARD_BYTES


def main(argv: list[str]) -> int:
    """Exports as the flags say; returns 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip export", description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint folder of this package, or a run")
    parser.add_argument("--format", choices=("hf",), default="hf", help="hf: Hugging Face")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--shard_bytes", type=int, default=SHARD_BYTES, help="largest shard")
    add_step(parser)
    args = parser.parse_args(argv)
    check_flags(args, stores=("folder", "out"))
    without_accelerator()
    from jax_instructblip import export

    export(args.folder, args.out, step=args.step, best=args.best, shard_bytes=args.shard_bytes)
    return 0
