"""Attention: one module for the projections, one function for whole rows, one for a cached step.

The only place where a kernel is chosen. Both functions are einsums with float32 scores and softmax,
which XLA fuses on every backend; odd lengths, biases and boolean masks need no special case.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED = -1e30  # finite, so that a row without any visible key stays free of NaN


class Attention(nn.Module):
    """The four projections of multi-head attention, heads kept as an axis of their own.

    `biases` names the projections that have one: the ViT has query, value and out but no key bias.
    """

    width: int
    heads: int
    head_width: int
    dtype: Any
    biases: tuple[str, ...] = ()

    def setup(self):
        heads = (self.heads, self.head_width)
        self.query = nn.DenseGeneral(heads, use_bias="query" in self.biases, dtype=self.dtype)
        self.key = nn.DenseGeneral(heads, use_bias="key" in self.biases, dtype=self.dtype)
        self.value = nn.DenseGeneral(heads, use_bias="value" in self.biases, dtype=self.dtype)
        self.out = nn.DenseGeneral(
            self.width, axis=(-2, -1), use_bias="out" in self.biases, dtype=self.dtype
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S Dc"],
        mask: Bool[Array, "#B 1 #T S"] | None = None,
        bias: Float[Array, "#B N T S"] | None = None,
        scale: float | None = None,
        drop: Callable[[Array], Array] | None = None,
    ) -> Float[Array, "B T D"]:
        mixed = attend(
            self.query(x), self.key(context), self.value(context), mask, bias, scale, drop
        )
        return self.out(mixed)


def attend(
    query: Float[Array, "B T N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    mask: Bool[Array, "#B 1 #T S"] | None = None,
    bias: Float[Array, "#B N T S"] | None = None,
    scale: float | None = None,
    drop: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T N K"]:
    """Values averaged by softmax(query . key x scale + bias) over the keys that `mask` shows.

    `scale` defaults to K^-0.5 and multiplies the query first, as the reference towers do (T5: 1.0).
    `drop` is applied to the weights, in training.
    """
    query = query * jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, query.dtype)
    scores = jnp.einsum("BTNK,BSNK->BNTS", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    if drop is not None:
        weights = drop(weights)
    return jnp.einsum("BNTS,BSNK->BTNK", weights.astype(value.dtype), value)


def attend_cached(
    query: Float[Array, "B R N K"],
    token: dict[str, Float[Array, "B R N K"]],
    tail: dict[str, Float[Array, "B R T N K"]],
    tail_mask: Bool[Array, "1 1 1 T"],
    prefix: dict[str, Float[Array, "B S N K"]] | None = None,
    prefix_mask: Bool[Array, "B 1 1 S"] | None = None,
    bias: Float[Array, "N T+1"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B R N K"]:
    """One new token of each of R rows looks at its prompt, at its own past, and at itself.

        [ prefix: shared by the R rows | tail: one a row, written slots only | the token itself ]

    Each dict holds `key` and `value`. The prefix is never repeated R times: the rows stand where
    attention over a whole row has its queries. The token's own key and value come apart from the
    tail, so that the tail is read but not copied; the caller writes them once, for all layers.
    `bias` is that of the tail's T slots and the token (T5, which has no prefix here).
    """
    query = query * jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, query.dtype)
    score = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    past = score("BRNK,BRTNK->BNRT", query, tail["key"])
    own = score("BRNK,BRNK->BNR", query, token["key"])[..., None]
    if bias is not None:
        past, own = past + bias[None, :, None, :-1], own + bias[None, :, None, -1:]
    parts = [jnp.where(tail_mask, past, MASKED), own]
    if prefix is not None:
        assert prefix_mask is not None
        seen = score("BRNK,BSNK->BNRS", query, prefix["key"])
        parts.append(jnp.where(prefix_mask, seen, MASKED))
    weights = jax.nn.softmax(jnp.concatenate(parts, axis=-1), axis=-1).astype(query.dtype)
    length = past.shape[-1]
    mixed = jnp.einsum("BNRT,BRTNK->BRNK", weights[..., :length], tail["value"])
    mixed += weights[..., length].transpose(0, 2, 1)[..., None] * token["value"]
    if prefix is not None:
        mixed += jnp.einsum("BNRS,BSNK->BRNK", weights[..., length + 1 :], prefix["value"])
    return mixed


def write_tail(tail: dict[str, Array], token: dict[str, Array], step: Array) -> dict[str, Array]:
    """The tail `[Y, B, R, T, N, K]` with a step's `[Y, B, R, N, K]` written to slot `step`."""
    return {
        name: jax.lax.dynamic_update_slice_in_dim(
            tail[name], token[name][:, :, :, None], step, axis=3
        )
        for name in tail
    }
