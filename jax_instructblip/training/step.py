"""One training step: a pure function of state, frozen weights, batch and random key."""

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
    """Returns the state after one step and its metrics, float32 scalars by name.

    The gradient is taken with respect to `state.params` only, so none of a frozen weight is ever
    computed.

    Args:
      state: the state before the step.
      frozen: the top-level trees that are not trained.
      batch: a batch with targets, as drawn in `models/vlm.py`.
      rng: the run's random key, equal at every step: the step number is folded in here.
      objective: the loss to minimise.
      optimizer: turns gradients into updates.
      schedule: the learning rate of each step, used for the metrics only.
      clip_norm: the largest gradient norm; None: no clipping.
      accumulate: number of parts into which the batch is split, processed one after the other.
        Except for dropout the result does not change: each term is divided by its total over the
        whole batch.
      skip_non_finite: if the loss or the gradient norm is not finite, keep weights and moments; the
        step number still advances, for the schedule and the data.
      axis_name: the mapped axis under `jax.pmap`, where each device gets its own rows.

    Metrics: `loss`, metrics and totals of the objective (`tokens`: target tokens of the global
    batch), `gradient_norm` (before clipping), `parameter_norm` (trained weights, before the
    update), `learning_rate` and, with `skip_non_finite`, `skipped` (1 or 0).
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
        # The optimizer's step counts still advance, as the learning rate follows the step.
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
    """Returns `train_step` compiled with these settings; it donates the old state's buffers.

    Args:
      like: a state whose leaves have the shardings that the new state gets; needed by "jit" with a
        mesh, otherwise ignored.
      mesh: the mesh of the state; metrics are replicated on it. None: one device, only with "jit".
      mode: "jit": XLA divides one program; "pmap": each device runs the program on its own rows
        with its own copy of the weights.
      narrow_weights: True if frozen weights are narrower than float32. On CPU this turns off an XLA
        pass that would convert whole stacked towers to float32, several times the memory.
      settings: the keyword arguments of `train_step`.
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
    """Returns loss, metrics and gradient of the batch, each summed over `parts` parts."""

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
    """Reshapes `[G, ...]` to `[parts, G / parts, ...]`: part i takes the rows i, i + parts, ...

    With strided rows each device keeps its own; contiguous parts would move rows between devices.
    """
    rows = next(iter(batch.values())).shape[0]
    if rows % parts:
        raise ValueError(
            f"{rows} rows cannot be worked on in {parts} equal parts: choose a batch size that "
            "accumulate divides"
        )
    split = lambda leaf: leaf.reshape(rows // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)
    return jax.tree.map(split, batch)
