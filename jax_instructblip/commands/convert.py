"""Converts a Hugging Face folder, or original .pth files, to a checkpoint folder of ours.

A folder of InstructBLIP or BLIP-2 is converted whole. Of LAVIS's files give a model's and those of
the towers that it was saved without, and name the model:

    convert blip2_pretrained.pth eva_vit_g.pth --variant blip2-stage1 --bert bert-base-uncased ...
"""

import argparse
from pathlib import Path

from jax_instructblip.commands.flags import check_flags, without_accelerator
from jax_instructblip.models.released import VARIANTS


def main(argv: list[str]) -> int:
    """Writes the checkpoint folder; returns 0."""
    parser = argparse.ArgumentParser(
        prog="jax-instructblip convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        type=Path,
        nargs="+",
        help="a folder (config.json, *.safetensors and tokenizers), or .pth files",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument(
        "--variant",
        choices=sorted(VARIANTS),
        help="demand the sizes of this one; .pth files do not say theirs",
    )
    parser.add_argument(
        "--llm", type=Path, help="with .pth files: the language model's Hugging Face folder"
    )
    parser.add_argument(
        "--bert", type=Path, help="with .pth files: a folder with bert-base-uncased's tokenizer"
    )
    args = parser.parse_args(argv)
    check_flags(args, stores=("source", "out", "llm", "bert"))
    without_accelerator()
    from jax_instructblip import convert

    convert(args.source, args.out, variant=args.variant, llm=args.llm, bert=args.bert)
    return 0
