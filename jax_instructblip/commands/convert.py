"""Converts a Hugging Face folder, or LAVIS's .pth files, to this package's checkpoint format.

A folder of InstructBLIP or BLIP-2 holds the whole model. LAVIS saved frozen towers apart: give a
model's file together with its towers' files, and name the model:

    convert blip2_pretrained.pth eva_vit_g.pth --variant blip2-stage1 --bert bert-base-uncased ...
"""

import argparse
from pathlib import Path

from jax_instructblip.commands.flags import add_template, check_flags, without_accelerator
from jax_instructblip.models.released import VARIANTS


def main(argv: list[str]) -> int:
    """Converts as the flags say; returns 0."""
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
    add_template(parser)
    args = parser.parse_args(argv)
    check_flags(args, stores=("source", "out", "llm", "bert"))
    without_accelerator()
    from jax_instructblip import convert

    apart = {"llm": args.llm, "bert": args.bert}
    convert(args.source, args.out, variant=args.variant, template=args.template, **apart)
    return 0
