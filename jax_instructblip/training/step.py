"""One step of tuning: a pure function of state, frozen weights, batch and random key."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Sharding

from jax_instructblip.models.instructblip import Batch, InstructBlip
from jax_instructblip.training.loss import cross_entropy
from jax_instructblip.training.state import Params, TrainState

Metrics = dict[str, Array]
Step = Callable[[TrainState, Any, Batch, Array], tuple[TrainState, Metrics]]


def summed_loss(
    trainable: Any, frozen: Any, batch: Batch, rng: Array, model: InstructBlip
) -> tuple[Array, Array]:
    """The summed loss of the batch and its target tokens; dropout is drawn from `rng`."""
    params = {**frozen, **trainable}
    logits = model.apply({"params": params}, batch, train=True, rngs={"dropout": rng})
    return cross_entropy(cast(Array, logits), batch["targets"])


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    rng: Array,
    *,
    model: InstructBlip,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    clip_norm: float | None = None,
) -> tuple[TrainState, Metrics]:
    """The state after one step, and what is worth knowing about it as float32 scalars.

    The gradient is asked for with respect to `state.params` alone, so none of a frozen weight is
    ever computed. `rng` is the run's key, the same at every step: the step number is folded in.
    `clip_norm` is the largest norm that the gradient may have (None: no clipping).

    Metrics: `loss` (mean over the global batch's target tokens), `tokens` (how many those are),
    `gradient_norm` (before clipping), `parameter_norm` (trainable, before the update) and
    `learning_rate`.
    """
    rng = jax.random.fold_in(rng, state.step)
    value_and_gradient = jax.value_and_grad(summed_loss, has_aux=True)
    (total, tokens), gradient = value_and_gradient(state.params, frozen, batch, rng, model)
    count = jnp.maximum(tokens, 1.0)  # a batch without any target gives a loss of 0, not NaN
    gradient = jax.tree.map(lambda leaf: leaf / count, gradient)
    norm = optax.tree.norm(gradient)
    metrics = {
        "loss": total / count,
        "tokens": tokens,
        "gradient_norm": norm,
        "parameter_norm": optax.tree.norm(state.params),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    if clip_norm is not None:
        factor = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
        gradient = jax.tree.map(lambda leaf: leaf * factor, gradient)
    updates, moments = optimizer.update(gradient, state.optimizer, state.params)
    params = cast(Params, optax.apply_updates(state.params, updates))
    return TrainState(state.step + 1, params, moments), metrics


def compile_step(
    *,
    model: InstructBlip,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    clip_norm: float | None = None,
    sharding: Sharding | None = None,
    narrow_weights: bool = False,
) -> Step:
    """`train_step` of these settings under `jax.jit`; it takes the old state's buffers over.

    `sharding` is where state and metrics lie afterwards (a state that came back elsewhere would be
    compiled for anew). `narrow_weights` says that frozen weights are narrower than float32: XLA for
    CPUs would widen a whole stacked tower ahead of its scan, several times the model's memory.
    """
    step = functools.partial(
        train_step, model=model, optimizer=optimizer, schedule=schedule, clip_norm=clip_norm
    )
    options = None
    if narrow_weights and jax.default_backend() == "cpu":
        options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    return jax.jit(step, donate_argnums=0, out_shardings=sharding, compiler_options=options)
