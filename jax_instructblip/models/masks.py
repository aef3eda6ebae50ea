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


def tree_mask(ends: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """Each token of a tree sees itself and what leads to it: the candidates of a ranking.

    The tree stands in depth-first order, and `ends` says where what hangs below each token stops.
    For ends = 4 3 3 4 6 6, which is the tree (0 (1 2) 3) (4 5):

        # . . . . .
        # # . . . .
        # # # . . .
        # . . # . .
        . . . . # .
        . . . . # #
    """
    index = jnp.arange(ends.shape[1])
    still_open = index[None, :, None] < ends[:, None, :]
    return ((index[:, None] >= index[None, :])[None] & still_open)[:, None]


def written_mask(step: Int[Array, ""], length: int) -> Bool[Array, "1 1 1 {length}"]:
    """A new token sees the cache slots written before it; it sees itself apart from the cache.

    For step = 2 of length 4:

        # # . .
    """
    return (jnp.arange(length) < step)[None, None, None, :]
