"""Converts a Hugging Face InstructBLIP folder to a checkpoint folder of this package."""

import argparse
import sys
from pathlib import Path

import jax

from jax_instructblip import checkpoint
from jax_instructblip.atomic import check_room, refuse_existing
from jax_instructblip.commands.flags import check_flags
from jax_instructblip.conversion import hf_folder
from jax_instructblip.conversion.engine import is_finite
from jax_instructblip.conversion.stored_model import copy_tokenizers
from jax_instructblip.models.variants import VARIANTS, Variant, released_name
from jax_instructblip.progress import Progress


def main(argv: list[str]) -> int:
    """Writes the checkpoint folder; returns 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip convert", description=__doc__)
    parser.add_argument("folder", type=Path, help="config.json, *.safetensors and tokenizers")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--variant", choices=sorted(VARIANTS), help="demand the sizes of this one")
    args = parser.parse_args(argv)
    check_flags(args)
    jax.config.update("jax_platforms", "cpu")  # it is all files: no accelerator is held meanwhile

    refuse_existing(args.out)
    variant, source, leaves = hf_folder.convert_hf(args.folder, args.variant)
    unread = _tokenizer_problem(args.folder, variant)
    check_room(args.out, leaves.nbytes)
    absent, spoilt = [], []

    def add(folder: Path) -> None:
        checkpoint.write_config(folder, {"variant": variant.to_dict(), "source": source})
        absent.extend(copy_tokenizers(args.folder, folder))

    with Progress(round(leaves.nbytes / 1e6), "converting", "MB") as progress:

        def counted():
            done = 0
            for path, array in leaves:
                size = array.nbytes
                if not is_finite(array):
                    spoilt.append(path)
                yield path, array
                del array
                done, before = done + size, done
                progress.update(round(done / 1e6) - round(before / 1e6), path)

        manifest = checkpoint.write_tree(args.out, counted(), extra=add)
    dtypes = ", ".join(f"{count} tensors {name}" for name, count in source["dtypes"].items())
    print(
        f"{args.out}: {released_name(variant) or 'a variant of its own size'}, {dtypes} -> "
        f"{len(manifest)} leaves, {leaves.nbytes / 1e9:.2f} GB"
    )
    for key, reason in leaves.dropped.items():
        print(f"left out {key}: {reason}")
    if source["tied_head"]:
        print("the folder has no lm_head: filled from the tied embedding")
    for name in absent:
        print(f"warning: no {name} in {args.folder}: the checkpoint cannot answer", file=sys.stderr)
    if spoilt:
        print(
            f"warning: NaN or infinity in {', '.join(spoilt)}: is a file of {args.folder} damaged, "
            "or were its weights rounded to float16? Answers may end in an error",
            file=sys.stderr,
        )
    if unread and not absent:
        print(f"warning: {unread}: the checkpoint cannot answer", file=sys.stderr)
    return 0


def _tokenizer_problem(folder: Path, variant: Variant) -> str:
    """A sentence about tokenizers that are not there; ValueError for damaged or foreign ones."""
    from jax_instructblip.data.text import TextProcessor  # seconds, which --help need not wait for

    try:
        TextProcessor.load(folder, variant)
    except FileNotFoundError as error:
        return str(error)
    return ""
