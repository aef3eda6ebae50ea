"""Cross-entropy of the target tokens."""

import jax
import jax.numpy as jnp
from jax import Array

from jax_instructblip.data.batch import IGNORE


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """The sum of -log p(target) over the target tokens, and how many they are; both float32.

    `logits` are `[B, T, V]`, `targets` are ids `[B, T]` with `IGNORE` where nothing is asked. The
    loss of a batch is the ratio of the two. They come apart because the mean is over the target
    tokens of the *global* batch: shards add up numerators and denominators before they divide, so
    the loss does not depend on how many devices share it.
    """
    asked = targets != IGNORE
    logits = logits.astype(jnp.float32)
    # logsumexp - logit keeps one [B, T, V] array for the gradient; log_softmax would keep two.
    chosen = jnp.take_along_axis(logits, jnp.where(asked, targets, 0)[..., None], axis=-1)[..., 0]
    surprise = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.where(asked, surprise, 0.0).sum(), asked.sum(dtype=jnp.float32)
