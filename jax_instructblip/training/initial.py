"""The start of a run: frozen weights, the weights to train, and where they came from."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_instructblip import checkpoint
from jax_instructblip.checkpoint import stored_leaf
from jax_instructblip.conversion.positions import fit_positions, resize_note
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import base_digest, read_params, read_source
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vlm import model_of, param_shapes
from jax_instructblip.parallel import rules
from jax_instructblip.training.state import Params, partition


@dataclasses.dataclass(frozen=True)
class Initial:
    """A model ready to be tuned.

    Attributes:
      variant: its sizes, with the changes asked for.
      trainable: the top-level trees to train, float32.
      frozen: the others.
      base: where they lie: `name` as given, absolute `path`, `sha256` of its manifest.
      folder: the base's folder, which has the tokenizers.
      notes: what a person should know about where the weights came from, one sentence each.
    """

    variant: Variant
    trainable: Params
    frozen: Params
    base: dict[str, str]
    folder: Path
    notes: tuple[str, ...]


def load_initial(
    base: str | os.PathLike,
    *,
    init: str | os.PathLike = "",
    trainable: tuple[str, ...] = ("qformer",),
    fields: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    frozen_dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
) -> Initial:
    """The weights of the checkpoint `base`, of which `trainable` come from `init` where given.

    `base` is a checkpoint folder or an embedded name; `init` may also be a run or a Hugging Face
    folder of the same sizes. `fields` are changes of the variant (`{"qformer.dropout": 0.0}`).
    With `qformer.instruction_aware` False the text branch of the Q-Former is left out, with another
    `vision.image_size` the table of positions is resized. `dtype` is what the model will compute
    in. With a `mesh` each leaf goes straight to where the rules put it, device by device.

    Raises:
        ValueError: a change that the weights do not allow, an `init` of other sizes, or a `dtype`
            that the model cannot compute in.
        CheckpointError: a damaged checkpoint.
    """
    source = read_source(base)
    other = (
        read_source(init) if init else None
    )  # what is not there is told before gigabytes are read
    digest = base_digest(source)
    variant = source.variant.replace(**(fields or {}))
    # The model refuses a dtype when it is bound: now, before gigabytes are read.
    _ = model_of(variant, jnp.dtype(dtype)).bind({}).vision
    notes = [f"frozen weights: {source.folder} (sha256 {digest[:12]}...)"]
    if mesh is not None:  # what it cannot divide is told now, too
        rules.shardings(param_shapes(variant), mesh)
        notes += rules.remarks(param_shapes(variant), mesh)

    lacking = _lacking(variant, source.variant if other is None else other.variant, trainable)

    def place(path: str, array: np.ndarray) -> jax.Array | None:
        """The leaf on its devices in its dtype; None where it comes from `init`."""
        trains = path.partition("/")[0] in trainable
        if trains and init and path not in lacking:
            return None
        array = fit_positions(path, array, variant.vision)
        floats = jnp.issubdtype(array.dtype, jnp.floating)
        dtype = array.dtype if not floats else (jnp.float32 if trains else frozen_dtype)
        return rules.place(path, array, mesh, dtype)

    processes = {"process": jax.process_index(), "processes": jax.process_count()}
    chosen, frozen = partition(read_params(source, place, **processes), trainable)
    if jax.process_count() > 1:
        megabytes = checkpoint.manifest_bytes(checkpoint.read_manifest(source.folder)) / 1e6
        read = stored_leaf.bytes_read() / 1e6
        notes.append(f"this process read {read:.3f} of {megabytes:.3f} MB of the base")
    if other is not None:

        def place_init(path: str, array: np.ndarray) -> jax.Array | None:
            if path.partition("/")[0] not in trainable:
                return None
            return rules.place(path, fit_positions(path, array, variant.vision), mesh, jnp.float32)

        own = {path: leaf for path, leaf in checkpoint.flatten(chosen).items() if path in lacking}
        chosen = partition(read_params(other, place_init, **processes), trainable)[0]
        chosen = checkpoint.unflatten({**checkpoint.flatten(chosen), **own})
    starts = source if other is None or "vision" not in trainable else other
    notes += filter(None, [resize_note(starts.variant.vision, variant.vision)])
    notes.append(f"{', '.join(trainable)} starts from: {init or source.folder}")
    if lacking:
        parts = ", ".join(sorted({path.split("/")[1] for path in lacking}))
        notes.append(f"{init} is of another stage and lacks {parts}: from {source.folder}")
    kept, dropped = _fit(chosen, variant, trainable)
    if variant.kind == "blip2":
        notes.append("a second stage of BLIP-2: its Q-Former does not read the instruction")
    if dropped:
        notes.append(
            f"not instruction-aware: left out {len(dropped)} leaves of the text branch "
            f"({', '.join(sorted({_branch(path) for path in dropped}))})"
        )
    where = {"name": os.fspath(base), "path": str(source.folder.absolute()), "sha256": digest}
    return Initial(variant, kept, frozen, where, source.folder, tuple(notes))


def load_untuned(run: Mapping[str, Any], blip: InstructBlipPipeline) -> InstructBlipPipeline:
    """The model that a run started from; `run` is its config.json, `blip` the model tuned since."""
    initial = load_initial(
        run["base"]["path"],
        init=run["config"]["model"]["init"],
        trainable=tuple(run["trainable"]),
        fields={
            "qformer.instruction_aware": blip.variant.qformer.instruction_aware,
            "vision.image_size": blip.variant.vision.image_size,
        },
        frozen_dtype=blip.model.dtype,
    )
    text = TextProcessor.load(initial.folder, initial.variant)
    dtype = jnp.dtype(blip.model.dtype)
    return InstructBlipPipeline(
        initial.variant, initial.frozen | initial.trainable, text, dtype=dtype
    )


def _lacking(variant: Variant, other: Variant, trainable: tuple[str, ...]) -> set[str]:
    """The leaves to train that a model of another stage does not have; empty for one of the same.

    The first stage of BLIP-2 has no projection to a language model, the second no text branch.
    """
    if other.kind == variant.kind:
        return set()
    shapes = param_shapes(variant)
    wanted = checkpoint.flatten({name: shapes[name] for name in trainable})
    return wanted.keys() - checkpoint.flatten(param_shapes(other)).keys()


def _fit(chosen: Params, variant: Variant, trainable: tuple[str, ...]) -> tuple[Params, list[str]]:
    """The leaves that `variant` has, and the paths of those that it does without."""
    shapes = param_shapes(variant)
    expected = checkpoint.flatten({name: shapes[name] for name in trainable})
    leaves = checkpoint.flatten(chosen)
    # What the same variant with instructions has on top: nothing else can be dropped.
    kind = "instructblip" if variant.kind == "blip2" else variant.kind
    known = dataclasses.replace(variant, kind=kind)
    aware = param_shapes(known.replace(**{"qformer.instruction_aware": True}))
    dropped = sorted(leaves.keys() & (checkpoint.flatten(aware).keys() - expected.keys()))
    wrong = []
    for path in sorted((leaves.keys() | expected.keys()) - set(dropped)):
        found = leaves[path].shape if path in leaves else "nothing"
        wanted = expected[path].shape if path in expected else "nothing"
        if found != wanted:
            wrong.append(f"{path}: found {found}, expected {wanted}")
    if wrong:
        raise checkpoint.CheckpointError(
            "\n  ".join([f"these weights do not fit the model to train ({len(wrong)}):", *wrong])
        )
    return checkpoint.unflatten({path: leaves[path] for path in expected}), dropped


def _branch(path: str) -> str:
    """The part of the Q-Former's text branch that a leaf belongs to; "" if to none."""
    return next((word for word in path.split("/") if word.startswith(("text_", "position_"))), "")
