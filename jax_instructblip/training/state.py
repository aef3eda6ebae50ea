"""The state that tuning changes: step number, trained weights, the optimizer's moments."""

import difflib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from jax_instructblip.parallel import rules

Params = dict[str, Any]


class TrainState(NamedTuple):
    """A pytree; the frozen weights are no part of it.

    step       [] int32, steps made so far
    params     the trained top-level trees, float32
    optimizer  its moments, float32, of the same shapes; nothing of a frozen weight
    """

    step: Array
    params: Params
    optimizer: optax.OptState


def partition(params: Params, trainable: tuple[str, ...]) -> tuple[Params, Params]:
    """The trees named in `trainable`, and the frozen others (`{'qformer': ...}`, the rest).

    Raises:
        ValueError: nothing to train, or names that are no top-level trees, with the nearest ones.
    """
    unknown = [name for name in trainable if name not in params]
    if unknown or not trainable:
        hints = [near for name in unknown for near in difflib.get_close_matches(name, params, n=1)]
        hint = f"; did you mean {', '.join(map(repr, hints))}?" if hints else ""
        raise ValueError(
            f"cannot train {list(unknown or trainable)}: the parts of this model are "
            f"{', '.join(params)}{hint}"
        )
    chosen = {name: tree for name, tree in params.items() if name in trainable}
    return chosen, {name: tree for name, tree in params.items() if name not in trainable}


def create_state(
    trainable: Params, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
    """The state before the first step; `trainable` is copied to float32, whatever it was stored in.

    Copied, because the step gives the state's buffers away. With a `mesh` every leaf, the moments
    too, is made where the rules put it; left to itself the compiler would make moments whole on
    every device.
    """

    def make(trainable: Params) -> TrainState:
        params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trainable)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    if mesh is None:
        return make(trainable)
    placed = rules.shardings(jax.eval_shape(make, trainable), mesh)
    return jax.jit(make, out_shardings=placed)(trainable)
