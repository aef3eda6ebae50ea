"""Memory and FLOPs of a step, from its compiled program; needs neither weights nor the chips.

`job.read_job` turns a config into a `Job`, `compile_job` a job and a mesh of (absent) devices into
a `Report`. The program is the one that `train` runs, compiled for the same mesh and shapes: the
longest rows that the config allows.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh, NamedSharding

from jax_instructblip import checkpoint
from jax_instructblip.data import spec
from jax_instructblip.data.packing import round_up
from jax_instructblip.inference import decode
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.loading import unstacks
from jax_instructblip.models import flops, quantise
from jax_instructblip.models.attention_kernels import kernel_for
from jax_instructblip.models.blip2 import Blip2
from jax_instructblip.models.cache import expand_beams
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.vlm import (
    VisionLanguageModel,
    is_unstacked,
    model_of,
    param_shapes,
    unstack_decoder,
)
from jax_instructblip.parallel import rules
from jax_instructblip.parallel.mesh import batch_sharding, replicated
from jax_instructblip.planning import hlo
from jax_instructblip.planning.chips import EFFORTS
from jax_instructblip.planning.job import Job, check_rows, fit_rows
from jax_instructblip.training.objective import LanguageObjective, Objective
from jax_instructblip.training.pair_objective import PairObjective
from jax_instructblip.training.state import TrainState, create_state, partition
from jax_instructblip.training.step import compile_step

# The compiler's messages if a program does not fit: "Used 17.2G of 15.75G hbm", "... (16.17G)
# exceeds available HBM (15.75G)".
_REFUSALS = (
    re.compile(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of compiling a step; bytes are per chip.

    Attributes:
      arguments: weights, moments and batch.
      outputs: results that do not reuse the memory of an argument.
      temporaries: everything else that the step holds at its peak.
      code: the program itself.
      residuals: the part of the temporaries that is kept for the backward pass, estimated from
        shapes.
      need: the total; if the compiler refused, the total that its message states.
      refusal: the compiler's message if the program does not fit, else "".
      program: collectives and cycles; None if the compiler refused.
      flops: FLOPs of all products in a step, on all chips together.
      seconds: the seconds that each part of the work took, by name: "trace", "lower", "compile".
      text: the compiled program; "" if the compiler refused.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    residuals: int
    need: int
    refusal: str
    program: hlo.Program | None
    flops: int
    seconds: Mapping[str, float]
    text: str = dataclasses.field(default="", repr=False)


def compile_job(
    job: Job,
    mesh: Mesh,
    *,
    effort: float = EFFORTS["quick"],
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Compiles the step of a job for a mesh and reports its memory, FLOPs and traffic.

    The devices of the mesh may be absent ones (`read_topology`). `effort` is the compiler's, a
    value of `EFFORTS`; `options` are more of its options by name, as `Topology.options` are.

    Raises:
        ValueError: weights or batch cannot be divided over the mesh.
    """
    check_rows(job, mesh)
    arguments = job_arguments(job, mesh)
    function = job_function(job, mesh, arguments)
    return compile_function(
        function, arguments, mesh, loops=job.loops, effort=effort, options=options
    )


def compile_function(
    function: Any,
    arguments: tuple[Any, ...],
    mesh: Mesh,
    *,
    loops: int = 1,
    effort: float = EFFORTS["quick"],
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Compiles a jitted function for arguments of these shapes, as `compile_job` does a step.

    `arguments` are trees of `jax.ShapeDtypeStruct` with shardings over `mesh`. Loops of unknown
    length count as if they ran `loops` times. `effort` and `options` are as in `compile_job`.
    """
    clock = time.perf_counter()
    seconds = {}

    def stop(name: str) -> None:
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()

    with jax.set_mesh(mesh):
        traced = function.trace(*arguments)
        jaxpr = traced.jaxpr.jaxpr
        stop("trace")
        lowered = traced.lower()
        stop("lower")
        compiled, refusal, need = None, "", 0
        try:
            compiled = _compile(lowered, effort, options)
        except jax.errors.JaxRuntimeError as error:
            refusal, need = _refusal(error)
        stop("compile")
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    facts = dict(
        arguments=bytes_per_device(arguments),
        residuals=residuals(jaxpr) // rows,
        flops=flops.count(jaxpr, loops=loops),
        seconds=seconds,
        refusal=refusal,
    )
    if compiled is None:
        return Report(outputs=0, temporaries=0, code=0, need=need, program=None, **facts)
    stats: Any = compiled.memory_analysis()
    parts = dict(
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    facts["arguments"] = stats.argument_size_in_bytes
    need, text = sum(parts.values()) + facts["arguments"], compiled.as_text()
    program = hlo.read_program(text, mesh.size, loops=loops)
    return Report(need=need, program=program, text=text, **parts, **facts)


def job_arguments(job: Job, mesh: Mesh) -> tuple[Any, ...]:
    """The arguments of the step to compile, as `jax.ShapeDtypeStruct`s with shardings.

    They are (state, frozen weights, batch, random key) of step "train", and (weights, batch, a key
    for each sample) of "decode".
    """
    job = fit_rows(job, mesh)
    shapes = param_shapes(job.variant)
    rows = batch_sharding(mesh)
    # Shapes as the loader's; random keys are uint32 pairs behind an opaque dtype.
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = _whole(mesh, key)
    batch = _batch(job, rows)
    if job.step == "decode":
        params = _frozen(job, shapes, quantise.TOWERS)
        if unstacks(job.variant, mesh, mesh.devices.flat[0].platform):
            apart = jax.eval_shape(functools.partial(unstack_decoder, job.variant), params)
            params = jax.tree.map(functools.partial(_whole, mesh), apart)
        else:
            params = _place(params, mesh)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), job.batch))
        keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=rows)
        return params, batch, keys
    chosen, frozen = partition(shapes, job.trainable)
    frozen = {name: tree for name, tree in frozen.items() if name not in job.frozen_unused}
    towers = quantise.frozen_towers(job.variant, job.trainable) if job.quantise else ()
    frozen = _frozen(job, frozen, towers)
    state = jax.eval_shape(functools.partial(create_state, optimizer=job.optimizer), chosen)
    return _place(state, mesh), _place(frozen, mesh), batch, key


# Weights of a language model that a step of decoding does not read whole: it looks rows of tables
# up, and the rest is read with the prompt.
_NOT_BY_TOKEN = re.compile(
    r"^llm/(embed|position_embed|encoder)/|/relative_bias$|/cross_attention/(key|value)/"
)


def token_bytes(job: Job, mesh: Mesh, beams: int = 1) -> int:
    """The bytes that a device must read for each new token: weights once, and the whole cache.

    The weights are those of the language model that each token passes. `job` has the step "decode";
    in the cache each prompt has `beams` rows of new tokens.
    Devices are assumed to share the cache evenly.
    """
    arguments = job_arguments(job, mesh)
    params, batch, _ = arguments
    tied = getattr(job.variant.llm, "tied_head", job.variant.llm.kind == "opt")
    read = {
        path: leaf
        for path, leaf in checkpoint.flatten(params).items()
        if path.startswith("llm/")
        and not _NOT_BY_TOKEN.search(path)
        or tied
        and path.startswith("llm/embed/")
    }
    model, tail = answering_model(job, params), max(job.new_tokens - 1, 1)
    prefill = lambda params, batch: model.apply({"params": params}, batch, tail, method="prefill")
    expanded = lambda *inputs: expand_beams(prefill(*inputs)[1], beams)
    cache: Any = jax.eval_shape(expanded, params, batch)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return bytes_per_device(read) + held // mesh.size


def bytes_per_device(tree: Any) -> int:
    """The bytes that each device holds of a tree of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += size * math.prod(shape)
    return total


def residuals(jaxpr: Jaxpr) -> int:
    """The bytes that scans over layers keep for the backward pass, summed over all devices.

    `jaxpr` is that of the traced step. All arrays that its scans stack, one part per layer, count
    with their global shapes.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            carried = equation.params["num_carry"]
            stacked: list[Any] = [each.aval for each in equation.outvars[carried:]]
            total += sum(aval.size * aval.dtype.itemsize for aval in stacked)
        for inner in _inner(equation):
            total += residuals(inner)
    return total


def _inner(equation: Any) -> Iterator[Jaxpr]:
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part


def _frozen(job: Job, tree: Any, towers: Sequence[str]) -> Any:
    """Shapes of frozen weights as a run holds them, quantised kernels of `towers` included."""
    tree = jax.tree.map(lambda leaf: _like(leaf, job.frozen_dtype), tree)
    if job.quantise is None:
        return tree
    return quantise.shapes(tree, job.quantise, towers)


def _like(leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype)


def _whole(mesh: Mesh, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))


def _place(tree: Any, mesh: Mesh) -> Any:
    placed = rules.shardings(tree, mesh)
    put = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(put, tree, placed)


def _batch(job: Job, rows: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch with the keys of `data/spec.py`, all samples of the greatest length."""
    if job.variant.llm is None:
        sizes = {"G": job.batch, "L": job.lengths["captions"]}
        return _shapes(job, sizes, rows)
    shared = job.samples_per_row
    row_length = round_up if shared > 1 else lambda length: length  # as `TrainBatches` pads rows
    row = job.row if shared > 1 else {"row_slots": 0, "row_targets": 0}
    answer = row_length(row["row_targets"] or shared * job.lengths.get("targets", 0))
    slots = row["row_slots"] or shared * (job.variant.visual_tokens + job.lengths["tokens"])
    sizes = {
        "G": job.batch // shared,
        "J": shared,
        "I": shared,
        "L": job.lengths["qformer_tokens"],
        "X": row_length(slots),
        "A": answer,
        "U": answer,
    }
    return _shapes(job, sizes, rows)


def _shapes(
    job: Job, sizes: Mapping[str, int], rows: NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    training = job.step == "train"
    shapes = spec.shapes(job.variant, sizes, training=training, patches=job.patches)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, (shape, dtype) in shapes.items()
    }


def job_function(job: Job, mesh: Mesh, arguments: tuple[Any, ...]) -> Any:
    """The jitted function of the step to compile; `arguments` come from `job_arguments`."""
    if job.step == "decode":
        model = answering_model(job, arguments[0])
        return jax.jit(
            lambda params, batch, keys: decode.generate_tokens(
                model, params, batch, keys, GenerationConfig(max_new_tokens=job.new_tokens)
            )
        )
    state: TrainState = arguments[0]
    return compile_step(
        like=state,
        mesh=mesh,
        objective=_objective(job, mesh),
        optimizer=job.optimizer,
        schedule=job.schedule,
        clip_norm=job.clip_norm,
        accumulate=job.accumulate,
        skip_non_finite=job.skip_non_finite,
    )


def answering_model(job: Job, params: Any) -> VisionLanguageModel:
    """The model with which a pipeline answers from `params`, weights or their shapes.

    The model depends on `params` only in one point: whether the layers that decode are unstacked,
    each with arrays of its own.
    """
    scans = Scans(llm=Scan(unstacked=is_unstacked(job.variant, params)))
    return VisionLanguageModel(job.variant, job.dtype, scans)


def _objective(job: Job, mesh: Mesh) -> Objective:
    """The loss of the step: language, or the three terms of BLIP-2's first stage."""
    model = model_of(job.variant, job.dtype, job.scans.on(kernel_for(mesh.devices.flat[0])))
    if isinstance(model, Blip2):
        return PairObjective(model, job.pairs_by_image)
    return LanguageObjective(model)


def _compile(lowered: Any, effort: float, options: Mapping[str, Any] | None) -> Any:
    name = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, name)
    jax.config.update(name, effort)
    try:
        return lowered.compile(dict(options) if options else None)
    finally:
        jax.config.update(name, before)


def _refusal(error: Exception) -> tuple[str, int]:
    """The compiler's message about memory, and the bytes needed; raises other errors."""
    text = str(error)
    for pattern in _REFUSALS:
        if match := pattern.search(text):
            line = next(line for line in text.splitlines() if match[0] in line)
            return line.strip(), int(float(match[1]) * _UNITS[match[2]])
    raise error
