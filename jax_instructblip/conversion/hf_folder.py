"""Reads a Hugging Face folder: its config.json is checked, its tensors become our parameters."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax_instructblip import checkpoint
from jax_instructblip.conversion.engine import Drop, Entry, Plan, make_plan
from jax_instructblip.conversion.families import Family, family_of, with_own_head
from jax_instructblip.conversion.hf_config import (
    check_preprocessor,
    check_variant,
    has_tied_embeddings,
    read_config,
    read_json,
    variant_of,
)
from jax_instructblip.conversion.input_formats import usual_input_format
from jax_instructblip.conversion.safetensors import (
    ConversionError,
    Tensor,
    fingerprint,
    open_folder,
)
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vlm import param_shapes

SIDE_FILES = ("generation_config", "preprocessor_config", "processor_config")  # kept for an export


class Conversion(NamedTuple):
    """A folder ready to be converted.

    Attributes:
      variant: the sizes of the model.
      source: facts about the folder, for our config.json.
      leaves: the parameters of our network; iterating makes (path, array), one at a time.
      input_format: how prompts and images are put to the model.
    """

    variant: Variant
    source: dict[str, Any]
    leaves: Plan
    input_format: InputFormat


def convert_hf(folder: str | Path, variant: str | Variant | None = None) -> Conversion:
    """Returns the conversion of a Hugging Face folder: all is checked, but no weight is read yet.

    `variant` is the sizes that the folder must have, or the name of a released model.

    Raises:
        ConversionError: the folder cannot be converted; all reasons are listed.
    """
    folder = Path(folder)
    config = read_config(folder)
    described = variant_of(folder, config)
    family = family_of(described)
    if variant is not None:
        check_variant(folder, described, variant)
    tensors, prefixes = _respelled(folder, open_folder(folder), family)
    check_sizes(folder, described, family, tensors)
    check_preprocessor(folder, described)
    language = family.language(described)
    tied_head = False
    if language is not None:
        has_head = language.head in tensors
        described = dataclasses.replace(described, llm=with_own_head(described.llm, has_head))
        tied_head = has_tied_embeddings(config) and not has_head
    entries = family.rules(described, tied_head)
    _check_prefix(folder, entries, tensors)
    plan = make_plan(
        entries,
        tensors,
        checkpoint.flatten(param_shapes(described)),
        f"the tensors of {folder} do not fit its config.json",
    )
    source = _source(folder, config, family, tensors, plan, tied_head)
    if prefixes:
        source["prefixes"] = prefixes
    return Conversion(described, source, plan, usual_input_format(described, folder, source))


def _respelled(
    folder: Path, tensors: Mapping[str, Tensor], family: Family
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors by their names in the tables, and the prefixes that were changed.

    The latter are those of the tables, each with that of the folder. Raises a ConversionError if
    two tensors have the same name in the tables.
    """
    names: dict[str, list[str]] = {}
    prefixes: dict[str, str] = {}
    for name in tensors:
        ours, theirs = family.prefix(name)
        names.setdefault(ours + name.removeprefix(theirs), []).append(name)
        if ours != theirs:
            prefixes[ours] = theirs
    doubled = [" and ".join(each) for each in names.values() if len(each) > 1]
    if doubled:
        raise ConversionError(f"{folder} holds tensors twice, under names of two versions", doubled)
    return {name: tensors[each[0]] for name, each in names.items()}, prefixes


def check_sizes(folder: Path, variant: Variant, family: Family, tensors: Mapping[str, Any]) -> None:
    """Raises a ConversionError if a size in config.json exceeds every axis of the tensors.

    It does so before arrays of such a size are built. `variant` has the sizes, `family` is its
    architecture, and `tensors` are those of the folder by name.
    """
    longest = max((axis for tensor in tensors.values() for axis in tensor.shape), default=0)
    most = f"but the longest axis of all tensors is {longest}"
    wrong = []
    for name, value, is_count in family.sizes(variant):
        if is_count and value > len(tensors):
            wrong.append(f"{name} is {value}, but the folder has {len(tensors)} tensors in all")
        elif not is_count and value > longest:
            wrong.append(f"{name} is {value}, {most}")
    if (length := variant.vision.tokens) > longest:
        size = variant.vision.image_size
        wrong.append(f"vision_config.image_size is {size}, {most} (patches and CLS: {length})")
    if wrong:
        raise ConversionError(f"{folder}/config.json does not describe its tensors", wrong)


def _check_prefix(folder: Path, entries: Iterable[Entry], tensors: Mapping[str, Tensor]) -> None:
    """Raises a ConversionError, with a remedy, if all tensor names have the same extra prefix.

    A wrapped PyTorch model adds one, such as `module.`.
    """
    expected = {key for e in entries if not isinstance(e, Drop) for key in e.keys}
    if not tensors or expected & tensors.keys():
        return
    prefix = os.path.commonprefix(list(tensors))
    prefix = prefix[: prefix.rfind(".") + 1]
    for end in (n for n, letter in enumerate(prefix, start=1) if letter == "."):
        word = prefix[:end]
        if any(key.removeprefix(word) in expected for key in tensors):
            raise ConversionError(
                f"the tensors of {folder} have other names than a released folder",
                [
                    f"all {len(tensors)} begin with {word!r}, as a wrapped model saves them: take "
                    "it away (in PyTorch: state = {key.removeprefix("
                    f"{word!r}): t for key, t in state.items()}}) and save the folder again"
                ],
            )


def read_hf(
    folder: str | Path, *, place: checkpoint.Place | None = None
) -> tuple[Variant, checkpoint.Tree]:
    """Returns sizes (`Variant`) and parameters (a nested dict) of a Hugging Face folder.

    No checkpoint is written. `place(path, array)` returns what is kept of each parameter (on a
    device, in another dtype), as in `checkpoint.read_tree`. Raises as `convert_hf`.
    """
    variant, _, leaves, _ = convert_hf(folder)
    kept = {}
    for path, array in leaves:
        kept[path] = array if place is None else place(path, array)
        del array  # free it before the next one is made
    return variant, checkpoint.unflatten(kept)


def _source(
    folder: Path,
    config: dict[str, Any],
    family: Family,
    tensors: dict[str, Tensor],
    plan: Plan,
    tied_head: bool,
) -> dict[str, Any]:
    sides = {
        name: read_json(folder / f"{name}.json")
        for name in SIDE_FILES
        if (folder / f"{name}.json").is_file()
    }
    return {
        "kind": "huggingface",
        "architecture": family.architecture,
        "dtypes": dict(Counter(tensor.dtype.name for tensor in tensors.values())),
        "files": fingerprint(tensors),
        "tied_head": tied_head,
        "dropped": plan.dropped,
        "config": config,
        **sides,
    }
