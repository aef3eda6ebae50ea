"""The training state: step number, trained weights, optimizer moments."""

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
    """A pytree of everything that a step changes; the frozen weights are not in it.

    step       [] int32, number of finished steps
    params     the trained top-level trees, float32
    optimizer  optax state of `params` only, moments in float32
    """

    step: Array
    params: Params
    optimizer: optax.OptState


MODELS_WITH = {  # part -> the models that have it
    "qformer": "InstructBLIP and BLIP-2",
    "projector": "LLaVA",
    "heads": "BLIP-2's first stage",
    "llm": "models that answer, not of BLIP-2's first stage",
}


def partition(params: Params, trainable: tuple[str, ...]) -> tuple[Params, Params]:
    """Splits `params` into the top-level trees named in `trainable` and the frozen others.

    Raises:
        ValueError: `trainable` is empty or has unknown names; the nearest names are suggested.
    """
    unknown = [name for name in trainable if name not in params]
    if unknown or not trainable:
        hints = [near for name in unknown for near in difflib.get_close_matches(name, params, n=1)]
        hint = f"; did you mean {', '.join(map(repr, hints))}?" if hints else ""
        hint += "".join(
            f"; {name!r} is a part of {MODELS_WITH[name]}"
            for name in unknown
            if name in MODELS_WITH
        )
        raise ValueError(
            f"cannot train {list(unknown or trainable)}: the parts of this model are "
            f"{', '.join(params)}{hint}"
        )
    chosen = {name: tree for name, tree in params.items() if name in trainable}
    return chosen, {name: tree for name, tree in params.items() if name not in trainable}


def create_state(
    trainable: Params, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
    """Returns the state before the first step, with a float32 copy of `trainable`.

    A copy, because `train_step` donates the state's buffers. With a `mesh` every leaf is sharded by
    `parallel/rules.py`, the moments too: the compiler would replicate them on every device.
    """

    def make(trainable: Params) -> TrainState:
        params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trainable)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    if mesh is None:
        return make(trainable)
    placed = rules.shardings(jax.eval_shape(make, trainable), mesh)
    return jax.jit(make, out_shardings=placed)(trainable)
