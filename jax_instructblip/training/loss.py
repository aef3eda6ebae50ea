"""Cross-entropy of the target tokens."""

import jax
import jax.numpy as jnp
from jax import Array

from jax_instructblip.data.spec import IGNORE


def cross_entropy(logits: Array, targets: Array, smoothing: float = 0.0) -> Array:
    """Returns the sum of -log p(target) over all valid targets, a float32 scalar.

    `logits` are `[G, A, V]` (rows, targets of a row, vocabulary); `targets` are ids `[G, A]`, with
    `IGNORE` on padding. `smoothing` is label smoothing as in PyTorch: this share of each target's
    weight is spread evenly over all ids. The caller divides the sum by `count_targets` of the
    *global* batch, so that the loss does not depend on the number of devices.
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
    """Returns the number of targets that are not `IGNORE`, a float32 scalar."""
    return (targets != IGNORE).sum(dtype=jnp.float32)
