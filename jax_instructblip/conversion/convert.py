"""Converts a Hugging Face folder to a checkpoint folder of this package."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jax_instructblip import checkpoint, stores
from jax_instructblip.atomic import check_room
from jax_instructblip.conversion import hf_folder
from jax_instructblip.conversion.engine import is_finite
from jax_instructblip.conversion.stored_model import copy_tokenizers
from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.models.released import released_name
from jax_instructblip.models.variants import Variant
from jax_instructblip.progress import count_bytes
from jax_instructblip.remote import is_remote


def convert(
    folder: str | os.PathLike, out: str | os.PathLike, *, variant: str | None = None
) -> Path | str:
    """Converts a Hugging Face InstructBLIP or BLIP-2 folder to a checkpoint folder of this package.

    Prints what was converted; what the checkpoint lacks is printed to stderr.

    Args:
      folder: a folder with config.json, *.safetensors and tokenizers, as downloaded or saved by
        transformers.
      out: the folder to make, or its address in an object store (`gs://...`). It must not exist,
        and appears when it is complete.
      variant: name of a released model (`models/released.py`) whose sizes the folder must have.

    Returns:
      The folder `out`, or its address.

    Raises:
      ValueError: the folder cannot be converted (all reasons are listed), or a tokenizer is damaged
        or of another model.
      OSError: `out` exists, or the disk has too little room.
    """
    with stores.output_folder(out) as (target, title):
        _convert(stores.input_path(folder, "folder"), target, title, variant)
    return title if is_remote(out) else target


def _convert(folder: Path, out: Path, title: str, variant: str | None) -> None:
    described, source, leaves = hf_folder.convert_hf(folder, variant)
    unread = _tokenizer_problem(folder, described)
    check_room(out, leaves.nbytes)
    absent: list[str] = []
    not_finite: list[str] = []

    def add(partial: Path) -> None:
        checkpoint.write_config(partial, {"variant": described.to_dict(), "source": source})
        absent.extend(copy_tokenizers(folder, partial, described))

    with count_bytes(leaves.nbytes, "converting") as count:

        def counted() -> Iterator[tuple[str, np.ndarray]]:
            for path, array in leaves:
                size = array.nbytes
                if not is_finite(array):
                    not_finite.append(path)
                yield path, array
                del array  # free it before the next one is made
                count(size, path)

        manifest = checkpoint.write_tree(out, counted(), extra=add)
    dtypes = ", ".join(f"{number} tensors {name}" for name, number in source["dtypes"].items())
    print(
        f"{title}: {released_name(described) or 'a variant of its own size'}, {dtypes} -> "
        f"{len(manifest)} leaves, {leaves.nbytes / 1e9:.2f} GB"
    )
    for key, reason in leaves.dropped.items():
        print(f"left out {key}: {reason}")
    if source["tied_head"]:
        print("the folder has no lm_head: filled from the tied embedding")
    for name in absent:
        print(f"warning: no {name} in {folder}: the checkpoint cannot answer", file=sys.stderr)
    if not_finite:
        print(
            f"warning: NaN or infinity in {', '.join(not_finite)}: is a file of {folder} damaged, "
            "or were its weights rounded to float16? Answers may end in an error",
            file=sys.stderr,
        )
    if unread and not absent:
        print(f"warning: {unread}: the checkpoint cannot answer", file=sys.stderr)


def _tokenizer_problem(folder: Path, variant: Variant) -> str:
    """Returns a sentence about missing tokenizers, "" if there are none missing.

    Raises:
        ValueError: a tokenizer is damaged or of another model.
    """
    reader = TextProcessor if variant.llm is not None else CaptionTokenizer
    try:
        reader.load(folder, variant)
    except FileNotFoundError as error:
        return str(error)
    return ""
