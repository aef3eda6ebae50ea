"""The cache of a language model: what it has read of the prompt, and of the R rows behind it.

    prefix       key, value  [B, N, S, K]    of each layer: image and prompt (T5: the encoder's
                                             output), shared by the R rows of a sample
    prefix_mask              [B, S]          False on padding
    tail         key, value  [B, N, T*R, K]  of each layer: slot t * R + r is row r's at step t
    lineage              [B, R, T]           whose slot t each row continues
    step                 []                  steps that the tail holds so far

A plain pytree, passed in and returned. `prefix` and `tail` hold their layers as the parameters do:
stacked on axis 0, or a tuple of one tree each (`layers.Scan.unstacked`).

Rows never move. Where a beam search lets row 2 continue row 0, row 2 takes over the lineage of row
0, and the mask shows it those slots; greedy decoding has one row, and a lineage of zeros:

    lineage of row 2    [0 0 1 . .]     its steps 0 and 1 are row 0's, step 2 is row 1's
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.attention import CachedKV, CurrentKV
from jax_instructblip.models.masks import lineage_mask

Cache = dict[str, Any]


def start(prefix: Any, valid: Bool[Array, "B S"], length: int) -> Cache:
    """The cache of a prompt, with room for `length` steps of one row."""
    empty = lambda leaf: jnp.zeros((*leaf.shape[:-2], length, leaf.shape[-1]), leaf.dtype)
    return {
        "prefix": prefix,
        "prefix_mask": valid,
        "tail": jax.tree.map(empty, prefix),
        "lineage": jnp.zeros((valid.shape[0], 1, length), jnp.int32),
        "step": jnp.zeros((), jnp.int32),
    }


def expand_beams(cache: Cache, rows: int) -> Cache:
    """The cache with `rows` equal rows a sample instead of one."""
    batch, _, length = cache["lineage"].shape
    own = jnp.arange(rows, dtype=jnp.int32)[None, :, None]
    return {
        **cache,
        "tail": jax.tree.map(lambda leaf: jnp.repeat(leaf, rows, axis=-2), cache["tail"]),
        "lineage": jnp.broadcast_to(own, (batch, rows, length)),
    }


def reorder_beams(cache: Cache, parents: Int[Array, "B R"]) -> Cache:
    """The cache whose row r continues row `parents[r]`."""
    lineage = jnp.take_along_axis(cache["lineage"], parents[..., None], axis=1)
    return {**cache, "lineage": lineage}


class TailView(NamedTuple):
    """The slots of the tail that the rows of a step see, for all layers alike."""

    mask: Bool[Array, "B 1 R S"]
    slot: (
        Int[Array, ""] | None
    )  # where a layer writes its tokens before it attends; None: the caller
    past: Float[Array, "1 N 1 S"] | None = None  # bias of the slots (T5)
    newest: Float[Array, " N"] | None = None  # bias of the token where it is not written first


def tail_view(cache: Cache) -> TailView:
    """The tail as the next step sees it.

    A stack of layers is written by `append` afterwards, for all layers at once: a scan that
    returned the tails would copy them. Unstacked layers write their own tails, first: what is read
    and written in no order is copied, too.
    """
    if isinstance(cache["tail"], tuple):
        rows, step = cache["lineage"].shape[1], cache["step"]
        return TailView(lineage_mask(_advance(cache)["lineage"], step + 1), step * rows)
    return TailView(lineage_mask(cache["lineage"], cache["step"]), None)


def attend_tail(tail: Any, token: Any, view: TailView) -> tuple[CachedKV, CurrentKV | None, Any]:
    """The keys and values that a step of one layer attends to, and what it returns for `append`.

    `token` has its key and value `[B, N, R, K]`, `tail` is the layer's.
    """
    if view.slot is None:
        past = CachedKV(**tail, mask=view.mask, bias=view.past)
        return past, CurrentKV(**token, bias=view.newest), token
    tail = {name: _put(leaf, token[name], view.slot) for name, leaf in tail.items()}
    return CachedKV(**tail, mask=view.mask, bias=view.past), None, tail


def append(cache: Cache, outputs: Any) -> Cache:
    """The cache one step longer; `outputs` is what the layers returned by `attend_tail`."""
    if not isinstance(outputs, tuple):
        slot = cache["step"] * cache["lineage"].shape[1]
        outputs = {name: _put(leaf, outputs[name], slot) for name, leaf in cache["tail"].items()}
    return {**_advance(cache), "tail": outputs}


def _put(tail: Array, token: Array, slot: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(tail, token, slot, axis=tail.ndim - 2)


def _advance(cache: Cache) -> Cache:
    """The cache whose rows continue themselves at the next step."""
    lineage, step = cache["lineage"], cache["step"]
    own = jnp.arange(lineage.shape[1], dtype=jnp.int32)[None, :, None]
    own = jnp.broadcast_to(own, (*lineage.shape[:2], 1))
    lineage = jax.lax.dynamic_update_slice_in_dim(lineage, own, step, axis=2)
    return {**cache, "lineage": lineage, "step": step + 1}
