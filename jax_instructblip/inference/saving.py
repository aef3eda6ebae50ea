"""Saving a model in memory as a checkpoint folder that `load` reads."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_instructblip import checkpoint, stores
from jax_instructblip.atomic import check_room
from jax_instructblip.conversion.stored_model import copy_tokenizers, write_sides
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import LIMITS, Source
from jax_instructblip.models.quantise import form_of
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vlm import DECODERS, is_unstacked


def save_checkpoint(
    out: str | os.PathLike,
    variant: Variant,
    params: dict[str, Any],
    text: TextProcessor,
    source: Source | None = None,
) -> None:
    """Writes the checkpoint folder `out`: parameters in their present dtypes, tokenizers, config.

    With `source`, from which the model was loaded, the tokenizers and the record of the weights'
    origin are copied from there. `out`, a folder or an address in an object store, appears when it
    is complete.

    Raises:
        FileExistsError: `out` exists.
        ValueError: other processes hold parts of the parameters, or they are quantised.
        OSError: there is too little space, or writing failed.
    """
    if form := form_of(params):
        raise ValueError(
            f"{out} is not written: the weights were made {form} when they were loaded, and a "
            "checkpoint keeps those of before; load the model without `quantise`"
        )
    leaves = jax.tree.leaves(params)
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
        raise ValueError(
            f"{out} is not written: other processes hold parts of the parameters; load the model "
            "in one process, or use `jax-instructblip merge`, which needs no device"
        )

    def add(partial: Path) -> None:
        limits = {name: getattr(text, name) for name in LIMITS}
        facts = {} if source is None else source.facts
        write_sides(partial, variant, facts, limits, text.input_format)
        if source is None:
            text.llm.save_pretrained(partial / "tokenizer")
            if text.qformer is not None:
                text.qformer.save_pretrained(partial / "qformer_tokenizer")
        else:
            copy_tokenizers(source.folder, partial, variant)

    with stores.output_folder(out) as (target, _):
        check_room(target, sum(leaf.nbytes for leaf in leaves))
        checkpoint.write_tree(target, _stacked(variant, params), extra=add)


def _stacked(variant: Variant, params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, array) for a checkpoint, in which all layers of a tower are one stack.

    Layers that `unstack_decoder` has split are stacked again.
    """
    flat = checkpoint.flatten(params)
    if not is_unstacked(variant, params):
        yield from flat.items()
        return
    prefix = DECODERS[variant.llm.kind] + "/"
    stacks: dict[str, dict[int, Any]] = {}
    for path, leaf in flat.items():
        if path == "llm/head/kernel":
            yield path, np.asarray(leaf)[: variant.llm.vocab].T
        elif path.startswith(prefix):
            number, _, rest = path.removeprefix(prefix).partition("/")
            stacks.setdefault(rest, {})[int(number)] = leaf
        else:
            yield path, leaf
    for rest, layers in stacks.items():
        yield prefix + rest, np.stack([np.asarray(layers[n]) for n in sorted(layers)])
