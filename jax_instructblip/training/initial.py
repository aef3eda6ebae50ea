"""The initial weights of a run: which are frozen, which are trained, and where they came from."""

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
from jax_instructblip.data.chat_text import load_text_processor
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.inference.loading import (
    base_digest,
    place_quantised,
    read_params,
    read_source,
)
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.models import quantise as quantisation
from jax_instructblip.models.variants import QFormerConfig, Variant
from jax_instructblip.models.vlm import model_of, param_shapes
from jax_instructblip.parallel import rules
from jax_instructblip.training.state import Params, partition


@dataclasses.dataclass(frozen=True)
class Initial:
    """A model ready to be trained.

    Attributes:
      variant: sizes and kind of the model, with the config's changes applied.
      trainable: the top-level trees to train, float32.
      frozen: the other top-level trees.
      base: the checkpoint of the frozen weights: `name` as given, absolute `path`, `sha256` of
        its manifest.
      folder: the folder of the base, which has the tokenizers.
      notes: one sentence each about where the weights came from, to be shown to the user.
      input_format: how prompts and images are put to the base.
    """

    variant: Variant
    trainable: Params
    frozen: Params
    base: dict[str, str]
    folder: Path
    notes: tuple[str, ...]
    input_format: InputFormat = InputFormat()


def load_initial(
    base: str | os.PathLike,
    *,
    init: str | os.PathLike = "",
    trainable: tuple[str, ...] = ("qformer",),
    fields: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    frozen_dtype: Any = jnp.bfloat16,
    quantise: str | None = None,
    mesh: Mesh | None = None,
    leave_out: tuple[str, ...] = (),
) -> Initial:
    """Loads the checkpoint `base`; if `init` is set, trainable trees are read from `init`.

    Args:
      base: a checkpoint folder, or the name of an embedded checkpoint.
      init: a checkpoint, run or Hugging Face folder of the same sizes; "" means `base`.
      trainable: the top-level trees to train.
      fields: changes of the variant (`{"qformer.dropout": 0.0}`). With
        `qformer.instruction_aware` False the text branch of the Q-Former is dropped;
        with another `vision.image_size` the table of positions is resized.
      dtype: the dtype that the model will compute in; only checked here.
      frozen_dtype: the dtype of the frozen weights.
      quantise: the form of the kernels of frozen vision towers and language models, "int8" or
        "int4" (`models/quantise.py`); None leaves them as they are.
      mesh: if given, each leaf is put on the devices with the sharding of `parallel/rules.py`,
        else on the default device.
      leave_out: names of frozen top-level trees that no program reads; `frozen` lacks them.

    Raises:
        ValueError: a change that does not fit the weights, `init` of other sizes, a `dtype` that
            the model cannot compute in, or nothing frozen that can be quantised.
        CheckpointError: a damaged checkpoint.
    """
    source = read_source(base)
    other = (
        read_source(init) if init else None
    )  # a missing `init` must fail before gigabytes are read
    digest = base_digest(source)
    variant = source.variant.replace(**(fields or {}))
    # Binding the model raises if it cannot compute in this dtype: before gigabytes are read.
    _ = model_of(variant, jnp.dtype(dtype)).bind({}).vision
    notes = [f"frozen weights: {source.folder} (sha256 {digest[:12]}...)"]
    if mesh is not None:  # raises now if a leaf cannot be divided over the mesh
        rules.shardings(param_shapes(variant), mesh)
        notes += rules.remarks(param_shapes(variant), mesh)

    lacking = _lacking(variant, source.variant if other is None else other.variant, trainable)

    towers = quantisation.frozen_towers(variant, trainable) if quantise else ()
    if quantise:
        notes.append(f"frozen kernels in {quantise}: {', '.join(towers)}")

    def cast(path: str, array: np.ndarray) -> jax.Array:
        """Casts a leaf of the base and puts it on its devices; scales of kernels stay float32."""
        floats = jnp.issubdtype(array.dtype, jnp.floating)
        wide = path.partition("/")[0] in trainable or quantisation.is_scale(path)
        dtype = array.dtype if not floats else (jnp.float32 if wide else frozen_dtype)
        return rules.place(path, array, mesh, dtype)

    def place(path: str, array: np.ndarray) -> Any:
        """Places a leaf of the base, quantised if need be; None if it comes from elsewhere.

        `init` supplies trained leaves; those of `leave_out` are not needed.
        """
        tree = path.partition("/")[0]
        if tree in leave_out or tree in trainable and init and path not in lacking:
            return None
        array = fit_positions(path, array, variant.vision)
        return place_quantised(cast, quantise, path, array, towers)

    processes = {"process": jax.process_index(), "processes": jax.process_count()}
    chosen, frozen = partition(read_params(source, place, **processes), trainable)
    frozen = {name: tree for name, tree in frozen.items() if name not in leave_out}
    if jax.process_count() > 1:
        megabytes = checkpoint.manifest_bytes(checkpoint.read_manifest(source.folder)) / 1e6
        read = stored_leaf.bytes_read() / 1e6
        notes.append(f"this process read {read:.3f} of {megabytes:.3f} MB of the base")
    if other is not None:

        def place_init(path: str, array: np.ndarray) -> jax.Array | None:
            """Puts a trainable leaf of `init` on its devices as float32; None for other leaves."""
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
    asked = source.input_format
    return Initial(variant, kept, frozen, where, source.folder, tuple(notes), asked)


def load_untuned(run: Mapping[str, Any], blip: InstructBlipPipeline) -> InstructBlipPipeline:
    """Returns a pipeline with the weights that a run started from, before any training.

    `run` is the content of the run's config.json (`earlier_run.read_run`). `blip` is the tuned
    model, whose dtype, image size, quantisation and input format are used.
    """
    bridge, aware = blip.variant.bridge, {}
    if isinstance(bridge, QFormerConfig):
        aware = {"qformer.instruction_aware": bridge.instruction_aware}
    initial = load_initial(
        run["base"]["path"],
        init=run["config"]["model"]["init"],
        trainable=tuple(run["trainable"]),
        fields={"vision.image_size": blip.variant.vision.image_size, **aware},
        frozen_dtype=blip.model.dtype,
        quantise=quantisation.form_of(blip.params),
    )
    text = load_text_processor(initial.folder, initial.variant, blip.text.input_format)
    dtype = jnp.dtype(blip.model.dtype)
    return InstructBlipPipeline(
        initial.variant, initial.frozen | initial.trainable, text, dtype=dtype
    )


def _lacking(variant: Variant, other: Variant, trainable: tuple[str, ...]) -> set[str]:
    """Returns the paths of trainable leaves that a model of `other`'s kind does not have.

    Empty if both variants are of the same kind. Example: BLIP-2's first stage has no projection to
    a language model, its second stage no text branch.
    """
    if other.kind == variant.kind:
        return set()
    shapes = param_shapes(variant)
    wanted = checkpoint.flatten({name: shapes[name] for name in trainable})
    return wanted.keys() - checkpoint.flatten(param_shapes(other)).keys()


def _fit(chosen: Params, variant: Variant, trainable: tuple[str, ...]) -> tuple[Params, list[str]]:
    """Returns the leaves of `chosen` that `variant` has, and the sorted paths of the dropped ones.

    Only leaves of the Q-Former's text branch may be dropped. Raises a CheckpointError that lists
    missing, surplus and wrongly shaped leaves.
    """
    shapes = param_shapes(variant)
    expected = checkpoint.flatten({name: shapes[name] for name in trainable})
    leaves = checkpoint.flatten(chosen)
    # Only leaves that the instruction-aware variant has in addition may be dropped.
    dropped: list[str] = []
    if isinstance(variant.bridge, QFormerConfig):
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
    """Returns the component of the Q-Former's text branch that `path` belongs to; "" if none."""
    return next((word for word in path.split("/") if word.startswith(("text_", "position_"))), "")
