"""Tools of the numeric tests: a measure of error, and small models whose outputs vary."""

from typing import Any

import jax
import numpy as np

from jax_instructblip.models.released import get_variant
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vlm import param_shapes


def error(found: Any, expected: Any) -> float:
    """The largest difference as a part of the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def small(kind: str) -> Variant:
    """A variant of that language model ('t5', 'vicuna') smaller than the tiny ones."""
    return get_variant(f"tiny-{kind}").replace(
        **{"llm.vocab": 61, "qformer.vocab": 53, "qformer.max_positions": 24, "vision.layers": 2}
    )


def random_params(variant: Variant, seed: int = 0) -> dict[str, Any]:
    """Parameters that keep activations in range; unlike an `init` no bias is 0 and no scale 1."""
    draw = np.random.default_rng(seed)

    def leaf(path, like):
        names, shape = [step.key for step in path], like.shape
        values = draw.standard_normal(shape, np.float32)
        if names[-1] == "scale":
            return 1 + 0.1 * values
        if names[-1] == "kernel":
            inner = shape["layers" in names :]  # without the axis of layers
            goes_in = names[-2] in ("query", "key", "value")
            fan = inner[0] if goes_in else np.prod(inner[:-1])
            return 0.7 * fan**-0.5 * values
        return (0.1 if names[-1] == "bias" else 0.5) * values

    return jax.tree_util.tree_map_with_path(leaf, param_shapes(variant))
