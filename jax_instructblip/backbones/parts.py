"""Finds the parts of a new model: a model of some stage, a language model, a vision tower."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from jax_instructblip import remote
from jax_instructblip.backbones.joining import Part, part_of
from jax_instructblip.conversion.language_folder import is_language_folder, open_language
from jax_instructblip.conversion.stored_model import copy_tokenizers
from jax_instructblip.conversion.vision_folder import is_vision_folder, open_vision
from jax_instructblip.inference.loading import Source, read_source, resolve_checkpoint
from jax_instructblip.models.variants import LanguageConfig, QFormerConfig, VisionConfig


def source_of(path: str | os.PathLike[str], kind: str, wanted: str) -> Source:
    """Returns the model at a path, a checkpoint or a run.

    `kind` is the kind that its variant must have, one of `KINDS` (`models/variants.py`); `wanted`
    is words for such a model in the error, as in "the first stage".

    Raises:
        ValueError: the model is of another kind.
    """
    source = read_source(path)
    if source.variant.kind != kind:
        raise ValueError(
            f"{source.step or source.folder} is a model of kind {source.variant.kind}: expected "
            f"one of kind {kind}, {wanted}"
        )
    return source


def language_of(
    path: str | os.PathLike[str], *, released: bool = True
) -> tuple[LanguageConfig, Part, Callable[[Path], object]]:
    """Returns a language model's sizes, its parameters and a function that copies its tokenizer.

    `path` is a Hugging Face folder of a language model, or any checkpoint that has one. With
    `released` the former gets the special tokens of BLIP-2's releases, else it keeps its own. The
    function is called with the checkpoint folder to put the tokenizer into.

    Raises:
        ValueError: there is no language model, or it cannot be used, with every reason.
    """
    folder = resolve_checkpoint(path)
    if is_language_folder(folder):
        language, title = open_language(folder, released=released), _origin(path, folder)
        for note in language.notes:
            print(f"{title}: {note}")
        part = Part(title, language.nbytes, language)
        return language.config, part, lambda out: language.copy_tokenizer(out / "tokenizer")
    source = read_source(path)
    llm, bridge = source.variant.llm, source.variant.bridge
    if llm is None:
        raise ValueError(
            f"{source.step or source.folder} is a model of kind {source.variant.kind}, which has "
            "no language model: expected a Hugging Face folder of one, or a checkpoint with one"
        )
    part = part_of(source, lambda name: name.startswith("llm/"), path)
    plain = source.variant  # a variant that has no tokenizer but the language model's
    if isinstance(bridge, QFormerConfig):
        bridge = dataclasses.replace(bridge, instruction_aware=False)
        plain = dataclasses.replace(plain, kind="blip2", bridge=bridge)
    return llm, part, lambda out: copy_tokenizers(source.folder, out, plain)


def vision_of(path: str | os.PathLike[str]) -> tuple[VisionConfig, Part]:
    """Returns a vision tower's sizes and its parameters.

    `path` is a Hugging Face folder of CLIP, or any checkpoint.

    Raises:
        ValueError: the tower cannot be used, with every reason.
    """
    folder = resolve_checkpoint(path)
    if is_vision_folder(folder):
        config, tower = open_vision(folder)
        return config, Part(_origin(path, folder), tower.nbytes, tower)
    source = read_source(path)
    part = part_of(source, lambda name: name.startswith("vision/"), path)
    return source.variant.vision, part


def _origin(path: str | os.PathLike[str], folder: Path) -> str:
    """Returns the address in a store that `path` is, else the folder."""
    return remote.address_of(path) or str(folder)
