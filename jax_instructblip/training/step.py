"""One step of tuning: a pure function of state, frozen weights, batch and random key."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from jax_instructblip.models.vlm import Batch
from jax_instructblip.parallel import pmap
from jax_instructblip.parallel.mesh import replicated
from jax_instructblip.training.objective import Metrics, Objective, Totals, check_parts
from jax_instructblip.training.state import Params, TrainState

Step = Callable[[TrainState, Any, Batch, Array], tuple[TrainState, Metrics]]
Sums = tuple[Array, Metrics, Any]  # loss, metrics and gradient of a batch, or of a part of it


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    rng: Array,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    clip_norm: float | None = None,
    accumulate: int = 1,
    skip_non_finite: bool = False,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """The state after one step, and what is worth knowing about it as float32 scalars.

    The gradient is asked for with respect to `state.params` alone, so none of a frozen weight is
    ever computed. `rng` is the run's key, the same at every step: the step number is folded in.

    Args:
      state: before the step.
      frozen: the weights that are not trained.
      batch: as `models/vlm.py` draws it, targets included.
      rng: of dropout.
      objective: what is made smaller.
      optimizer: what makes updates of gradients.
      schedule: the learning rate of each step, for the metrics.
      clip_norm: the largest norm that the gradient may have (None: no clipping).
      accumulate: parts of the batch that are worked on one after the other. They add up to the
        same step: each term is divided by its total over all of them.
      skip_non_finite: whether weights and moments stay as they are where the loss or the gradient
        is no finite number; the step counts all the same, for the schedule and the data.
      axis_name: of the mapped axis under `jax.pmap`, where each device is given its own rows.

    Metrics: `loss`, what the objective tells besides, the totals of its terms (`tokens`: target
    tokens of the global batch), `gradient_norm` (before clipping), `parameter_norm` (trainable,
    before the update), `learning_rate` and, with `skip_non_finite`, `skipped` (1 or 0).
    """
    rng = jax.random.fold_in(rng, state.step)
    if axis_name is not None:
        rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
    totals = objective.totals(batch)
    if axis_name is not None:
        totals = jax.lax.psum(totals, axis_name)
    sums = _sums(state.params, frozen, batch, rng, objective, totals, accumulate)
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    loss, measured, gradient = sums
    norm = optax.tree.norm(gradient)
    metrics = {
        "loss": loss,
        **measured,
        **totals,
        "gradient_norm": norm,
        "parameter_norm": optax.tree.norm(state.params),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    if clip_norm is not None:
        factor = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
        gradient = jax.tree.map(lambda leaf: leaf * factor, gradient)
    updates, moments = optimizer.update(gradient, state.optimizer, state.params)
    params = cast(Params, optax.apply_updates(state.params, updates))
    if skip_non_finite:
        fine = jnp.isfinite(loss) & jnp.isfinite(norm)
        metrics["skipped"] = 1.0 - fine.astype(jnp.float32)
        keep = lambda new, old: jnp.where(fine, new, old)
        params = jax.tree.map(keep, params, state.params)
        # The optimizer's counts of steps go on: its learning rate is that of the step.
        counts = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.integer)
        moments = jax.tree.map(
            lambda new, old: new if counts(new) else keep(new, old), moments, state.optimizer
        )
    return TrainState(state.step + 1, params, moments), metrics


def compile_step(
    *,
    like: TrainState | None = None,
    mesh: Mesh | None = None,
    mode: str = "jit",
    narrow_weights: bool = False,
    **settings: Any,
) -> Step:
    """`train_step` of these settings, compiled; it takes the old state's buffers over.

    `settings` are the keyword arguments of `train_step`. With a `mesh` the state comes back as
    `like` lies (one that came back elsewhere would be compiled for anew), the metrics whole on
    every device. `mode` is "jit", where XLA divides one program for the whole batch, or "pmap",
    where every device runs the program of its own rows on weights of its own. `narrow_weights`
    says that frozen weights are narrower than float32: XLA for CPUs would widen a whole stacked
    tower ahead of its scan, several times the model's memory.
    """
    check_parts(
        settings["objective"], accumulate=settings.get("accumulate", 1), mapped=mode == "pmap"
    )
    step = functools.partial(train_step, **settings)
    if mode == "pmap":
        assert mesh is not None
        return pmap.compile_step(functools.partial(step, axis_name=pmap.AXIS), mesh)
    placed = None
    if mesh is not None:
        placed = jax.tree.map(lambda leaf: leaf.sharding, like), replicated(mesh)
    options = None
    if narrow_weights and jax.default_backend() == "cpu":
        options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    return jax.jit(step, donate_argnums=0, out_shardings=placed, compiler_options=options)


def _sums(
    trainable: Any,
    frozen: Any,
    batch: Batch,
    rng: Array,
    objective: Objective,
    totals: Totals,
    parts: int,
) -> Sums:
    """Loss, metrics and gradient of the batch, each summed over its `parts`."""

    def sums(rows: Batch, rng: Array) -> Sums:
        loss_of = lambda params: objective({**frozen, **params}, rows, rng, totals)
        (loss, measured), gradient = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        return loss, measured, gradient

    if parts == 1:
        return sums(batch, rng)

    def add(so_far: Sums, part: tuple[Array, Batch]) -> tuple[Sums, None]:
        number, rows = part
        addend = sums(rows, jax.random.fold_in(rng, number))
        return jax.tree.map(jnp.add, so_far, addend), None

    divided = _split(batch, parts)
    first = jax.tree.map(lambda leaf: leaf[0], divided)
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(sums, first, rng))
    return jax.lax.scan(add, nothing, (jnp.arange(parts), divided))[0]


def _split(batch: Batch, parts: int) -> Batch:
    """`[G, ...]` to `[parts, G / parts, ...]`: part i takes every parts-th row from i on.

    So each device keeps the rows that it has; runs of rows would have to move between devices.
    """
    rows = next(iter(batch.values())).shape[0]
    if rows % parts:
        raise ValueError(
            f"{rows} rows cannot be worked on in {parts} equal parts: choose a batch size that "
            "accumulate divides"
        )
    split = lambda leaf: leaf.reshape(rows // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)
    return jax.tree.map(split, batch)
