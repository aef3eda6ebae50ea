"""Converts a Hugging Face folder, or original LAVIS or LLaVA, to this package's checkpoint format.

A Hugging Face folder holds the whole model. LAVIS saved frozen towers apart: give a model's file
together with its towers' files, and name the model. Original LLaVA lacks its image tower, a delta
its base, and a projector the language model:

    convert blip2_pretrained.pth eva_vit_g.pth --variant blip2-stage1 --bert bert-base-uncased ...
    convert llava-v1.5-7b --vision clip-vit-large-patch14-336 --out llava
    convert LLaVA-7b-delta-v1-1 --base llama-7b --vision clip-vit-large-patch14 --out llava
    convert mm_projector.bin --llm vicuna-7b-v1.5 --vision clip-vit-large-patch14-336 --out llava
"""

import argparse
from pathlib import Path

from jax_instructblip.commands.flags import add_template, check_flags, without_accelerator
from jax_instructblip.models.released import VARIANTS

_FOLDERS = ("llm", "bert", "vision", "base")


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
        help="a folder (config.json, weights and tokenizers), mm_projector.bin, or .pth files",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument(
        "--variant",
        choices=sorted(VARIANTS),
        help="demand the sizes of this one; .pth files do not say theirs",
    )
    parser.add_argument(
        "--llm",
        type=Path,
        help="with .pth files or mm_projector.bin: the language model's Hugging Face folder",
    )
    parser.add_argument(
        "--bert", type=Path, help="with .pth files: a folder with bert-base-uncased's tokenizer"
    )
    add_template(parser)
    parser.add_argument("--vision", type=Path, help="with original LLaVA: the folder of its CLIP")
    parser.add_argument(
        "--base", type=Path, help="with a delta of LLaVA: the Hugging Face folder of its LLaMA"
    )
    args = parser.parse_args(argv)
    check_flags(args, stores=("source", "out", *_FOLDERS))
    without_accelerator()
    from jax_instructblip import convert

    folders = {name: getattr(args, name) for name in _FOLDERS}
    convert(args.source, args.out, variant=args.variant, template=args.template, **folders)
    return 0
