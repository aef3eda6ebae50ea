"""Every attention mask, drawn. True (#) means: the query of this row sees the key of this column.

Rows are never padded anywhere but at their end (`data/text.py` compacts what comes in otherwise),
so positions are plain indices and three pictures are enough.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def padding_mask(real: Bool[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """Everybody sees every real key: ViT without padding, Q-Former, T5 encoder, cross-attention.

    For real = 1 1 1 0:

        # # # .
        # # # .
        # # # .
        # # # .
    """
    return real[:, None, None, :]


def causal_mask(real: Bool[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """Each position sees the real ones up to itself: LLaMA rows and T5 targets.

    For real = 1 1 1 0 (a padded position still sees the real ones, so no row is empty):

        # . . .
        # # . .
        # # # .
        # # # .
    """
    index = jnp.arange(real.shape[1])
    return (index[:, None] >= index[None, :])[None, None] & padding_mask(real)


def written_mask(step: Int[Array, ""], length: int) -> Bool[Array, "1 1 1 {length}"]:
    """A new token sees the cache slots written before it; it sees itself apart from the cache.

    For step = 2 of length 4:

        # # . .
    """
    return (jnp.arange(length) < step)[None, None, None, :]
