"""A model with quantised kernels, and the same model with the weights that these stand for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip.checkpoint import trees
from jax_instructblip.models import quantise


def quantised(params: Any, form: str) -> tuple[Any, Any]:
    """Stacked parameters with quantised kernels, and with the rounded weights of these kernels."""
    flat = trees.flatten(params)
    parts, rounded = dict(flat), dict(flat)
    for path, leaf in flat.items():
        if not quantise.is_quantised(path):
            continue
        own = quantise.quantise(path, np.asarray(leaf), form)
        summed = 2 if path.endswith("attention/out/kernel") else 1
        layers = zip(jnp.asarray(own["q"]), jnp.asarray(own["scale"]), strict=True)
        shape = leaf.shape[1:]
        rounded[path] = jnp.stack([quantise.expand(*each, shape, summed) for each in layers])
        rounded[path] *= own.get("input_scale", 1.0)
        parts[path] = jax.tree.map(jnp.asarray, own)
    return trees.unflatten(parts), trees.unflatten(rounded)
