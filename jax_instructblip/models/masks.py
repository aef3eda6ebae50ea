"""All attention masks, drawn. `#` is True: the query of this line sees the key of this column.

A row holds one sample or several, each in consecutive slots; `segments` holds the number of the
sample in each slot, 0 on padding. So a comparison of indices tells what comes before what. Masks
are combined with `&`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def padding_mask(valid: Bool[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """Mask of all valid keys, for every query: the Q-Former's mask, and that of a cached prompt.

    For valid = 1 1 1 0, drawn for four queries:

        # # # .
        # # # .
        # # # .
        # # # .
    """
    return valid[:, None, None, :]


def segment_mask(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """Mask of the keys of the query's own sample: for T5's encoder and its cross-attention.

    `queries` and `keys` hold the sample number of each slot. Padding has number 0: no sample sees
    it, and it sees padding only, or nothing if there are no padded keys. For 1 1 2 0 as both:

        # # . .
        # # . .
        . . # .
        . . . #
    """
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def causal_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """Mask of a causal decoder: each slot sees itself and the earlier slots of its own sample.

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
    """Mask of a text after `prefix` queries: a token sees them and the tokens up to itself.

    `valid` is False on padded tokens. For valid = 1 1 0 and a prefix of 2:

        # # # . .
        # # # # .
        # # # # .
    """
    index = jnp.arange(valid.shape[1])
    earlier = (index[:, None] >= index[None, :])[None] & valid[:, None, :]
    queries = jnp.ones((*earlier.shape[:2], prefix), bool)
    return jnp.concatenate([queries, earlier], axis=2)[:, None]


def tree_mask(ends: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """Mask of a tree of tokens: each sees its ancestors and itself.

    In such a tree, continuations of a prompt share the tokens that they begin with. The tokens are
    in depth-first order; `ends` is the index just after each token's last descendant. For ends = 4
    3 3 4 6 6, where 0 has the children 1 and 3, 1 has the child 2, and 4 the child 5:

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
    """Mask of R beams over the cached tokens of earlier steps: each sees its own history.

    Slot t * R + r holds the token that beam r read at step t, and `lineage[b, r, t]` is the beam
    whose token of step t belongs to the history of beam r. Slots of steps from `step` on are still
    empty and hidden. For step = 2 of T = 3, lineage = (0 0 .) of beam 0 and (0 1 .) of beam 1:

        # . # . . .
        # . . # . .
    """
    rows, length = lineage.shape[1:]
    own = lineage[..., None] == jnp.arange(rows)[None, None, None]
    written = jnp.arange(length) < step
    return (own & written[None, None, :, None]).reshape(-1, 1, rows, length * rows)
