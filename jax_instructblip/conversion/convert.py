"""Converts a Hugging Face folder, original LLaVA or `.pth` files of LAVIS to a checkpoint."""

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_instructblip import checkpoint, stores
from jax_instructblip.atomic import check_room
from jax_instructblip.conversion import hf_folder
from jax_instructblip.conversion.engine import is_finite
from jax_instructblip.conversion.hf_folder import Conversion
from jax_instructblip.conversion.llava_original import LlavaOriginal, is_llava_source, read_llava
from jax_instructblip.conversion.original import Original, original_files, read_original
from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.conversion.stored_model import copy_tokenizers, write_sides
from jax_instructblip.conversion.tokenizer_settings import complete_settings, write_settings
from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.chat_text import ChatTextProcessor
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.models.released import released_name
from jax_instructblip.models.variants import Variant
from jax_instructblip.progress import count_bytes
from jax_instructblip.remote import is_remote

_GOES_WITH = {
    "llm": "original files (.pth, mm_projector.bin)",
    "bert": "original LAVIS files (.pth)",
    "vision": "original LLaVA (a folder or mm_projector.bin)",
    "base": "a delta of original LLaVA",
}


def convert(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    variant: str | Variant | None = None,
    llm: str | os.PathLike[str] | None = None,
    bert: str | os.PathLike[str] | None = None,
    template: str | None = None,
    vision: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Path | str:
    """Converts a Hugging Face folder, original LLaVA or `.pth` files of LAVIS to a checkpoint.

    Prints what was converted; what the checkpoint lacks is printed to stderr.

    Args:
      source: a folder of InstructBLIP, BLIP-2 or LLaVA with config.json, *.safetensors and
        tokenizers, as downloaded or saved by transformers; an original folder of LLaVA, or its
        `mm_projector.bin`; or `.pth` files of LAVIS: a model's file and those of the towers that
        were saved apart.
      out: the folder to make, or its address in an object store (`gs://...`). It must not exist,
        and appears when it is complete.
      variant: the sizes that the weights must have, or the name of a released model
        (`models/released.py`); required with `.pth` files, which do not tell their sizes.
      llm: with `.pth` files or `mm_projector.bin`, the Hugging Face folder of the language model.
      bert: with `.pth` files, a folder with the tokenizer of bert-base-uncased, for a Q-Former that
        reads text.
      template: the chat template that prompts are put in (a key of `CHAT_TEMPLATES`); by default
        that of its language model for LLaVA, and none for others.
      vision: with original LLaVA, which needs it, the folder of its CLIP.
      base: with a delta of LLaVA, the Hugging Face folder of the LLaMA that it is added to.

    Returns:
      The folder `out`, or its address.

    Raises:
      ValueError: the weights cannot be converted (all reasons are listed), or a tokenizer is
        damaged or of another model.
      OSError: `out` exists, or the disk has too little room.
    """
    with stores.output_folder(out) as (target, title):
        given = {"llm": llm, "bert": bert, "vision": vision, "base": base}
        folders = {name: stores.input_path(path, name) for name, path in given.items() if path}
        if files := original_files(source):
            _refuse_surplus(folders.keys() - {"llm", "bert"}, "original LAVIS files (.pth)")
            original = read_original(files, variant, **folders)
            name = " + ".join(map(str, files))
            asked = _asked_by(original.variant, original.input_format, template)
            copy = original.copy_tokenizers
            _write(original, (asked, template), copy, name, target, title)
        else:
            (path,) = [source] if isinstance(source, str | os.PathLike) else source
            folder = stores.input_path(path, "folder")
            found, tokenizer, settings = _read_folder(folder, variant, folders)
            copy = functools.partial(_copy_tokenizers, tokenizer, settings, found.variant)
            asked = (_asked_by(found.variant, found.input_format, template), template)
            # A foreign tokenizer is refused before anything is written.
            _check_tokenizer(tokenizer, settings, found.variant, asked)
            _write(found, asked, copy, str(folder), target, title)
    return title if is_remote(out) else target


def _read_folder(
    folder: Path, variant: str | Variant | None, others: dict[str, Path]
) -> tuple[Conversion | LlavaOriginal, Path, dict[str, Any] | None]:
    """Returns a conversion, the folder of its tokenizer and the settings that this lacks, or None.

    `others` are folders that were given beside the source, by the name of the argument.
    """
    if is_llava_source(folder):
        _refuse_surplus(others.keys() & {"bert"}, str(folder))
        original = read_llava(folder, variant, **others)
        return original, original.tokenizer, original.settings
    _refuse_surplus(others.keys(), f"{folder}, which is converted whole")
    found = hf_folder.convert_hf(folder, variant)
    return found, folder, complete_settings(folder) if found.variant.kind == "llava" else None


def _refuse_surplus(names: Iterable[str], what: str) -> None:
    """Raises a ConversionError if there are names of arguments that do not go with a source."""
    if names := sorted(names):
        raise ConversionError(
            f"not all of these go together with {what}",
            [f"{name} goes with {_GOES_WITH[name]}: leave it out" for name in names],
        )


def _copy_tokenizers(
    folder: Path, settings: dict[str, Any] | None, variant: Variant, out: Path
) -> list[str]:
    """Copies the tokenizers to `out` with other settings, if given; returns the missing ones."""
    absent = copy_tokenizers(folder, out, variant)
    if not absent:
        write_settings(out / "tokenizer", settings)
    return absent


def _check_tokenizer(
    folder: Path,
    settings: dict[str, Any] | None,
    variant: Variant,
    asked: tuple[InputFormat, str | None],
) -> None:
    """Raises a ValueError if a tokenizer is damaged or, with these settings, of another model."""
    if settings is None:
        _tokenizer_problem(folder, variant, *asked)
        return
    with tempfile.TemporaryDirectory() as copy:
        _copy_tokenizers(folder, settings, variant, Path(copy))
        _tokenizer_problem(Path(copy), variant, *asked)


def _write(
    conversion: Conversion | Original | LlavaOriginal,
    asked: tuple[InputFormat, str | None],
    copy: Callable[[Path], list[str]],
    name: str,
    out: Path,
    title: str,
) -> None:
    """Writes the checkpoint folder, and prints what is in it and what it lacks.

    `asked` is how the model is asked, and the chat template if one was chosen.
    """
    described, source, leaves = conversion[:3]
    check_room(out, leaves.nbytes)
    absent: list[str] = []
    unread: list[str] = []
    not_finite: list[str] = []

    def add(partial: Path) -> None:
        write_sides(partial, described, source, {}, asked[0])
        absent.extend(copy(partial))
        if not absent:
            unread.append(_tokenizer_problem(partial, described, *asked))

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
        print("the folder has no lm_head: the head is the token embedding")
    for tokenizer in absent:
        print(f"warning: no {tokenizer} in {name}: the checkpoint cannot answer", file=sys.stderr)
    if not_finite:
        print(
            f"warning: NaN or infinity in {', '.join(not_finite)}: is a file of {name} damaged, "
            "or were its weights rounded to float16? Answers may end in an error",
            file=sys.stderr,
        )
    for problem in filter(None, unread):
        print(f"warning: {problem}: the checkpoint cannot answer", file=sys.stderr)


def _asked_by(variant: Variant, usual: InputFormat, template: str | None) -> InputFormat:
    """Returns the input format: the usual one, or one with the chosen chat template."""
    if template is not None and variant.llm is None:
        raise ValueError(
            f"template is {template!r}, but a first stage of BLIP-2 is asked nothing: leave it out"
        )
    return usual.with_template(template)


def _tokenizer_problem(
    folder: Path, variant: Variant, asked: InputFormat, template: str | None
) -> str:
    """Returns a sentence about why a folder's tokenizers cannot write prompts, "" if they can.

    They are missing, or the usual chat template is of another tokenizer.

    Raises:
        ValueError: a tokenizer is damaged or of another model, or does not fit the `template` that
            was chosen.
    """
    try:
        if variant.llm is None:
            CaptionTokenizer.load(folder, variant)
            return ""
        text = TextProcessor.load(folder, variant, input_format=asked)
    except FileNotFoundError as error:
        return str(error)
    try:
        if asked.template:
            ChatTextProcessor.of(text)
    except ValueError as error:
        if template is not None:
            raise
        return f"{error}; name another one (--template), else"
    return ""
