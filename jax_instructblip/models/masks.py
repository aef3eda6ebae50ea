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


def lineage_mask(lineage: Int[Array, "B R T"], step: Int[Array, ""]) -> Bool[Array, "B 1 R S"]:
    """A new token sees the slots that its row continues, of the steps written before it.

    It sees itself apart from them. Slot t * R + r has what row r read at step t. For step = 2 of
    T = 3, lineage = (0 0 .) of row 0 and (0 1 .) of row 1:

        # . # . . .
        # . . # . .
    """
    rows, length = lineage.shape[1:]
    own = lineage[..., None] == jnp.arange(rows)[None, None, None]
    written = jnp.arange(length) < step
    return (own & written[None, None, :, None]).reshape(-1, 1, rows, length * rows)
