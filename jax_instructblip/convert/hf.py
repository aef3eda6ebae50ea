"""A Hugging Face InstructBLIP folder -> our leaves, checked against its config, one at a time."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from jax_instructblip import checkpoint
from jax_instructblip.convert import llama, qformer, t5, vision
from jax_instructblip.convert.engine import Entry, Plan, make_plan
from jax_instructblip.convert.hf_config import (
    ARCHITECTURE,
    check_variant,
    has_tied_embeddings,
    read_config,
    read_json,
    variant_of,
)
from jax_instructblip.convert.safetensors import Tensor, fingerprint, open_folder
from jax_instructblip.models.instructblip import param_shapes
from jax_instructblip.models.variants import T5Config, Variant

SIDE_FILES = ("generation_config", "preprocessor_config", "processor_config")  # for the export


class Conversion(NamedTuple):
    """A folder ready to be converted; iterating `leaves` makes (path, array), one at a time."""

    variant: Variant
    source: dict[str, Any]  # facts of the folder, for our config.json
    leaves: Plan


def convert_hf(folder: str | Path, variant: str | None = None) -> Conversion:
    """The conversion of a Hugging Face InstructBLIP folder, checked but with no weight read yet.

    `variant` demands the sizes of that released variant. Raises ConversionError with every reason
    why the folder cannot be converted.
    """
    folder = Path(folder)
    config = read_config(folder)
    found = variant_of(folder, config)
    if variant is not None:
        check_variant(folder, found, variant)
    tensors = open_folder(folder)
    table = t5 if isinstance(found.llm, T5Config) else llama
    tied_head = has_tied_embeddings(config) and table.HEAD not in tensors
    plan = make_plan(
        rules(found, tied_head),
        tensors,
        checkpoint.flatten(param_shapes(found)),
        f"the tensors of {folder} do not fit its config.json",
    )
    return Conversion(found, _source(folder, config, tensors, plan, tied_head), plan)


def rules(variant: Variant, tied_head: bool = False) -> list[Entry]:
    """The tables of all towers of a variant."""
    if isinstance(variant.llm, T5Config):
        language = t5.rules(variant.llm, tied_head)
    else:
        language = llama.rules(variant.llm, tied_head)
    return [*vision.rules(variant.vision), *qformer.rules(variant.qformer), *language]


def read_hf(
    folder: str | Path, *, place: checkpoint.Place | None = None
) -> tuple[Variant, checkpoint.Tree]:
    """The variant and parameters of a Hugging Face folder, without a checkpoint of ours on disk.

    `place(path, array)` returns what is kept of each leaf, as in `checkpoint.read_tree`.
    """
    variant, _, leaves = convert_hf(folder)
    kept = {}
    for path, array in leaves:
        kept[path] = array if place is None else place(path, array)
        del array  # before the next leaf is made
    return variant, checkpoint.unflatten(kept)


def _source(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], plan: Plan, tied_head: bool
) -> dict[str, Any]:
    sides = {
        name: read_json(folder / f"{name}.json")
        for name in SIDE_FILES
        if (folder / f"{name}.json").is_file()
    }
    return {
        "kind": "huggingface",
        "architecture": ARCHITECTURE,
        "dtypes": dict(Counter(tensor.dtype.name for tensor in tensors.values())),
        "files": fingerprint(tensors),
        "tied_head": tied_head,
        "dropped": plan.dropped,
        "config": config,
        **sides,
    }
