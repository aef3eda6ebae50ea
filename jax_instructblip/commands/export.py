"""Exports a checkpoint folder or a tuned run to Hugging Face's layout, or to original LLaVA's.

hf           a folder that stock transformers loads
original     LLaVA alone: the folder of its original code, and its image tower in vision_tower/
projector    LLaVA alone: mm_projector.bin
"""

import argparse
from pathlib import Path

from jax_instructblip.commands.flags import add_step, check_flags, without_accelerator
from jax_instructblip.conversion.layouts import LAYOUTS
from jax_instructblip.conversion.safetensors import SHARD_BYTES


def main(argv: list[str]) -> int:
    """Exports as the flags say; returns 0."""
    parser = argparse.ArgumentParser(
        prog="jax-instructblip export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a checkpoint folder of this package, or a run")
    parser.add_argument("--format", choices=LAYOUTS, default="hf", help="default: hf")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--shard_bytes", type=int, default=SHARD_BYTES, help="largest shard")
    add_step(parser)
    args = parser.parse_args(argv)
    check_flags(args, stores=("folder", "out"))
    without_accelerator()
    from jax_instructblip import export

    chosen = {"step": args.step, "best": args.best}
    export(args.folder, args.out, format=args.format, shard_bytes=args.shard_bytes, **chosen)
    return 0
