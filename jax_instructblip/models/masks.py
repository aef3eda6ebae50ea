"""Every attention mask, drawn. True (#) means: the query of this row sees the key of this column.

A row holds one sample or several, each in slots of its own without a gap (`segments`), so plain
indices tell what comes before what. Masks compose with `&`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def padding_mask(valid: Bool[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """The mask of the Q-Former, and of what decodes behind a cached prompt: all valid keys.

    For valid = 1 1 1 0:

        # # # .
        # # # .
        # # # .
        # # # .
    """
    return valid[:, None, None, :]


def segment_mask(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """The mask of T5's encoder, and of its cross-attention: the slots of the same sample.

    Padding, segment 0, sees padding alone, or nothing where the keys have none; no sample sees it.
    For segments 1 1 2 0 of both:

        # # . .
        # # . .
        . . # .
        . . . #
    """
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def causal_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """The mask of a decoder and of its rows: the slots of the same sample up to itself.

    For segments 1 1 2 2 0:

        # . . . .
        # # . . .
        . . # . .
        . . # # .
        . . . . #
    """
    index = jnp.arange(segments.shape[1])
    earlier = (index[:, None] >= index[None, :])[None, None]
    return earlier & segment_mask(segments, segments)


def prefix_causal_mask(valid: Bool[Array, "B T"], prefix: int) -> Bool[Array, "B 1 T S"]:
    """The mask of a caption that is written behind the queries: all of these, and what precedes.

    For valid = 1 1 0 and a prefix of 2:

        # # # . .
        # # # # .
        # # # # .
    """
    index = jnp.arange(valid.shape[1])
    earlier = (index[:, None] >= index[None, :])[None] & valid[:, None, :]
    queries = jnp.ones((*earlier.shape[:2], prefix), bool)
    return jnp.concatenate([queries, earlier], axis=2)[:, None]


def tree_mask(ends: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """The mask of a ranking's tree of candidates: a token sees itself and what leads to it.

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
    """The mask of new tokens: each sees the slots that its row continues, of earlier steps.

    It sees itself apart from them. Slot t * R + r has what row r read at step t. For step = 2 of
    T = 3, lineage = (0 0 .) of row 0 and (0 1 .) of row 1:

        # . # . . .
        # . . # . .
    """
    rows, length = lineage.shape[1:]
    own = lineage[..., None] == jnp.arange(rows)[None, None, None]
    written = jnp.arange(length) < step
    return (own & written[None, None, :, None]).reshape(-1, 1, rows, length * rows)
