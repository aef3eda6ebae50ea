"""Converts a Hugging Face folder of InstructBLIP or BLIP-2 to this package's checkpoint format."""

import argparse
from pathlib import Path

from jax_instructblip.commands.flags import check_flags, without_accelerator
from jax_instructblip.models.released import VARIANTS


def main(argv: list[str]) -> int:
    """Converts as the flags say; returns 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip convert", description=__doc__)
    parser.add_argument("folder", type=Path, help="config.json, *.safetensors and tokenizers")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--variant", choices=sorted(VARIANTS), help="demand the sizes of this one")
    args = parser.parse_args(argv)
    check_flags(args, stores=("folder", "out"))
    without_accelerator()
    from jax_instructblip import convert

    convert(args.folder, args.out, variant=args.variant)
    return 0
