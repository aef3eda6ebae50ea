"""The cache of a language model: keys and values of the prompt and of the tokens generated so far.

    prefix       key, value  [B, Nk, S, K]   per layer: image and prompt (T5: the encoder's
                                             output), shared by the R rows of a sample
    prefix_mask              [B, S]          False on padding
    tail         key, value  [B, Nk, T*R, K] per layer: generated tokens; slot t * R + r holds
                                             the token of row r at step t
    lineage              [B, R, T]           the row whose slot each row continues, per step
    step                 []                  number of steps that the tail holds so far

The cache is a plain pytree, passed in and returned. `prefix` and `tail` hold their layers as the
parameters do: stacked on axis 0, or as a tuple of one tree per layer (`layers.Scan.unstacked`).

Cached keys and values never move. When a beam search lets row 2 continue row 0, row 2 copies the
lineage of row 0, and the mask shows row 2 those slots. Greedy decoding has one row, whose lineage
is all zeros:

    lineage of row 2    [0 0 1 . .]     its steps 0 and 1 are in row 0's slots, step 2 in row 1's
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.attention import CachedKV, CurrentKV
from jax_instructblip.models.masks import lineage_mask

Cache = dict[str, Any]


def start(prefix: Any, valid: Bool[Array, "B S"], length: int) -> Cache:
    """The cache after a prompt, with one row per sample and space for `length` generated tokens.

    `prefix` holds the prompt's keys and values of all layers, in the form that this module
    describes; `valid` is False on padding.
    """
    empty = lambda leaf: jnp.zeros((*leaf.shape[:-2], length, leaf.shape[-1]), leaf.dtype)
    return {
        "prefix": prefix,
        "prefix_mask": valid,
        "tail": jax.tree.map(empty, prefix),
        "lineage": jnp.zeros((valid.shape[0], 1, length), jnp.int32),
        "step": jnp.zeros((), jnp.int32),
    }


def expand_beams(cache: Cache, rows: int) -> Cache:
    """Turns a cache with one row per sample into one with `rows` equal rows per sample."""
    batch, _, length = cache["lineage"].shape
    own = jnp.arange(rows, dtype=jnp.int32)[None, :, None]
    return {
        **cache,
        "tail": jax.tree.map(lambda leaf: jnp.repeat(leaf, rows, axis=-2), cache["tail"]),
        "lineage": jnp.broadcast_to(own, (batch, rows, length)),
    }


def reorder_beams(cache: Cache, parents: Int[Array, "B R"]) -> Cache:
    """Returns the cache in which beam r of sample b continues the former beam `parents[b, r]`."""
    lineage = jnp.take_along_axis(cache["lineage"], parents[..., None], axis=1)
    return {**cache, "lineage": lineage}


class TailView(NamedTuple):
    """The part of the cache's tail (generated tokens) that rows may see in one decoding step.

    `mask` is a result of `masks.lineage_mask`.
    """

    mask: Bool[Array, "B 1 R S"]
    slot: (
        Int[Array, ""] | None
    )  # the first slot to which a layer writes its tokens before it attends; None: `append` writes
    past: Float[Array, "1 N 1 S"] | None = None  # score bias of the slots (T5)
    newest: Float[Array, " N"] | None = None  # score bias of a token that is not in the tail yet

    @property
    def unstacked(self) -> bool:
        """True if the layers are one tree each (`layers.Scan.unstacked`)."""
        return self.slot is not None


def tail_view(cache: Cache) -> TailView:
    """The `TailView` of the next decoding step, which all layers share.

    Stacked layers do not write their new tokens: `append` does so afterwards for all layers at
    once, because a scan that returned the tails would copy them. Unstacked layers write their own
    tails before they attend, because XLA copies an array whose reads and writes have no fixed
    order.
    """
    if isinstance(cache["tail"], tuple):
        rows, step = cache["lineage"].shape[1], cache["step"]
        return TailView(lineage_mask(_advance(cache)["lineage"], step + 1), step * rows)
    return TailView(lineage_mask(cache["lineage"], cache["step"]), None)


def attend_tail(tail: Any, token: Any, view: TailView) -> tuple[CachedKV, CurrentKV | None, Any]:
    """Prepares one layer's attention to generated tokens; returns (cached, current, output).

    `tail` is the layer's dict of `key` and `value`, of earlier tokens; `token` is such a dict, each
    `[B, Nk, R, K]`, of the newest ones. `cached` and `current` are arguments of `attend_cached`; if
    the newest tokens are written to the tail first (`view.slot`), `current` is None. `output` is
    what `append` needs: the newest tokens, or the written tail.
    """
    if view.slot is None:
        past = CachedKV(**tail, mask=view.mask, bias=view.past)
        return past, CurrentKV(**token, bias=view.newest), token
    tail = {name: _put(leaf, token[name], view.slot) for name, leaf in tail.items()}
    return CachedKV(**tail, mask=view.mask, bias=view.past), None, tail


def append(cache: Cache, outputs: Any) -> Cache:
    """Returns the cache with the newest tokens added.

    `outputs` are those of `attend_tail` for all layers: stacked, or a tuple, as the tail itself.
    """
    if not isinstance(outputs, tuple):
        slot = cache["step"] * cache["lineage"].shape[1]
        outputs = jax.tree.map(lambda leaf, token: _put(leaf, token, slot), cache["tail"], outputs)
    return {**_advance(cache), "tail": outputs}


def _put(tail: Array, token: Array, slot: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(tail, token, slot, axis=tail.ndim - 2)


def _advance(cache: Cache) -> Cache:
    """Returns the cache with `step` + 1, each row continuing itself; keys and values stay."""
    lineage, step = cache["lineage"], cache["step"]
    own = jnp.arange(lineage.shape[1], dtype=jnp.int32)[None, :, None]
    own = jnp.broadcast_to(own, (*lineage.shape[:2], 1))
    lineage = jax.lax.dynamic_update_slice_in_dim(lineage, own, step, axis=2)
    return {**cache, "lineage": lineage, "step": step + 1}
