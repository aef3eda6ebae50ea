"""Cross-entropy of the target tokens."""

import jax
import jax.numpy as jnp
from jax import Array

from jax_instructblip.data.spec import IGNORE


def cross_entropy(logits: Array, targets: Array, smoothing: float = 0.0) -> Array:
    """The sum of -log p(target) over the target tokens, float32.

    With `smoothing` that part of each target's weight is spread evenly over all ids, as in PyTorch.

    `logits` are `[G, A, V]`, `targets` are ids `[G, A]` with `IGNORE` on padding. The loss of a
    batch divides it by `count_targets` of the *global* batch, so that it does not depend on how
    many devices share it.
    """
    asked = targets != IGNORE
    logits = logits.astype(jnp.float32)
    # logsumexp - logit keeps one [G, A, V] array for the gradient; log_softmax would keep two.
    chosen = jnp.take_along_axis(logits, jnp.where(asked, targets, 0)[..., None], axis=-1)[..., 0]
    if smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * logits.mean(axis=-1)
    surprise = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.where(asked, surprise, 0.0).sum()


def count_targets(targets: Array) -> Array:
    """The number of `targets` that are asked for, float32."""
    return (targets != IGNORE).sum(dtype=jnp.float32)
