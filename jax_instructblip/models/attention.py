"""Multi-head attention: the projections, attention over whole rows, attention over a cache.

All attention of the package is computed here, in two functions: `attend` takes all queries of a row
at once, `attend_cached` the newest tokens against cached keys. Both are einsums with float32 scores
and softmax, on every backend; odd lengths, biases and boolean masks work as well. In place of its
einsums `attend` can call a kernel that keeps no scores (`attention_kernels.py`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_instructblip.models import attention_kernels as kernels
from jax_instructblip.models.attention_kernels import CausalRows
from jax_instructblip.models.dense import Dense, apart

MASKED = -1e30  # finite, so that a row without any visible key stays free of NaN


class Attention(nn.Module):
    """Multi-head attention with its four projections; the kernels keep an axis of heads.

    `biases` names the projections that have a bias, of "query", "key", "value" and "out": the ViT
    has no key bias. `dtype` and `bias_dtype` are as in `dense.Dense`. `key_heads` is the number of
    key and of value heads if there are fewer of them than query heads; consecutive query heads then
    share one. `fused` is as in `attend`.

    A call takes the queries from `x` `[B, T, D]`, the keys and values from `context` `[B, S, Dc]`
    (`x` itself in self-attention); its other arguments are those of `attend`.
    """

    width: int
    heads: int
    head_width: int
    dtype: Any
    biases: tuple[str, ...] = ()
    bias_dtype: Any = jnp.float32
    key_heads: int | None = None
    fused: str = ""

    def setup(self):
        project = lambda name, heads: Dense(
            (heads, self.head_width), self.dtype, name in self.biases, bias_dtype=self.bias_dtype
        )
        key_heads = self.key_heads or self.heads
        self.query = project("query", self.heads)
        self.key, self.value = project("key", key_heads), project("value", key_heads)
        biased = "out" in self.biases
        self.out = Dense((self.width,), self.dtype, biased, contracted=2, wide=biased)

    def newest(
        self, x: Float[Array, "B R D"], unstacked: bool = True
    ) -> tuple[Array, Array, Array]:
        """Queries `[B, R, N, K]`, keys and values `[B, R, Nk, K]` of the newest tokens `x`.

        `unstacked` is as in `layers.Scan`.
        """
        first, second, third = apart(x.astype(self.dtype), 3) if unstacked else (x, x, x)
        return self.query(first), self.key(second), self.value(third)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S Dc"],
        mask: Bool[Array, "#B 1 #T S"] | None = None,
        bias: Float[Array, "#B N T S"] | None = None,
        scale: float | None = None,
        dropout: Callable[[Array], Array] | None = None,
    ) -> Float[Array, "B T D"]:
        query, key, value = self.query(x), self.key(context), self.value(context)
        return self.out(attend(query, key, value, mask, bias, scale, dropout, self.fused))


def attend(
    query: Float[Array, "B T N K"],
    key: Float[Array, "B S Nk K"],
    value: Float[Array, "B S Nk K"],
    mask: Bool[Array, "#B 1 #T S"] | CausalRows | None = None,
    bias: Float[Array, "#B N T S"] | None = None,
    scale: float | None = None,
    dropout: Callable[[Array], Array] | None = None,
    fused: str = "",
) -> Float[Array, "B T N K"]:
    """Attention: the average of `value` with weights softmax(query . key * scale + bias).

    Keys where `mask` is False get no weight; None hides no key. `scale` defaults to K^-0.5 (T5
    passes 1.0); the float32 scores are multiplied by it, because scaling a bfloat16 query would
    round once more. `dropout` is applied to the weights and is passed only in training. With fewer
    key than query heads, query head n reads key head n // (N / Nk), and `bias` must be None.
    `fused` names a kernel, "cudnn" or "splash", that computes all this where it can
    (`attention_kernels.takes`); "" names none.
    """
    factor: float = query.shape[-1] ** -0.5 if scale is None else scale
    fits = kernels.takes(fused, query, key, mask, bias, dropout)
    if isinstance(mask, CausalRows):
        if fits and fused == "splash":
            return kernels.splash(query, key, value, mask.segments, factor)
        mask = mask.mask
    if fits:
        return kernels.cudnn(query, key, value, mask, factor)
    shape, (query, n) = query.shape, _grouped(query, key.shape[2], axis=2)
    scores = (
        jnp.einsum(f"BT{n}K,BSNK->B{n}TS", query, key, preferred_element_type=jnp.float32) * factor
    )
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask if n == "N" else mask[:, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropout is not None:
        weights = dropout(weights)
    return jnp.einsum(f"B{n}TS,BSNK->BT{n}K", weights.astype(value.dtype), value).reshape(shape)


def _grouped(query: Array, key_heads: int, axis: int) -> tuple[Array, str]:
    """Splits the axis of query heads into key heads N and the Z queries of each, if Z > 1.

    Returns (query, letters of the axis in an einsum: "N" or "NZ"). Keys are never repeated: query
    head n attends to key head n // Z.
    """
    if query.shape[axis] == key_heads:
        return query, "N"
    shape = list(query.shape)
    shape[axis : axis + 1] = [key_heads, query.shape[axis] // key_heads]
    return query.reshape(shape), "NZ"


class CachedKV(NamedTuple):
    """Cached keys and values of each sample, shared by its R rows (beams or ranked candidates).

    `mask` is True where a row may see a slot; `bias`, T5's relative position bias, is added to the
    scores.
    """

    key: Float[Array, "B Nk S K"]
    value: Float[Array, "B Nk S K"]
    mask: Bool[Array, "#B 1 #R S"]
    bias: Float[Array, "#B N #R S"] | None = None


class CurrentKV(NamedTuple):
    """Key and value of each row's newest token, visible to that row only.

    `bias`, T5's relative position bias at distance 0, one per head, is added to the scores.
    """

    key: Float[Array, "B Nk R K"]
    value: Float[Array, "B Nk R K"]
    bias: Float[Array, " N"] | None = None


def attend_cached(
    query: Float[Array, "B R N K"],
    cached: Sequence[CachedKV],
    current: CurrentKV | None = None,
    scale: float | None = None,
) -> Float[Array, "B R N K"]:
    """Attention of R rows (beams, candidates) over their shared cache and their newest token.

    All scores of a row go through one softmax:

        [ cached: shared by the rows | cached: shared by the rows | current: the row's own token ]

    The R rows are the query axis, so nothing cached is repeated R times, concatenated or
    transposed. Heads come before slots in the cache because products on a CPU are faster in that
    order. `current` is separate so that a layer reads its cache before the newest token is written
    to it; it is None if a part of `cached` has that token. `scale` defaults to K^-0.5.
    """
    factor: float = query.shape[-1] ** -0.5 if scale is None else scale
    query = heads_first(query)
    shape, (query, n) = query.shape, _grouped(query, cached[0].key.shape[1], axis=1)
    score = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores, queries = [], apart(query, len(cached))  # else XLA for GPUs joins the keys to multiply
    for kv, own in zip(cached, queries, strict=True):
        logits = score(f"B{n}RK,BNSK->B{n}RS", own, kv.key) * factor
        logits = logits if kv.bias is None else logits + kv.bias
        scores.append(jnp.where(kv.mask if n == "N" else kv.mask[:, None], logits, MASKED))
    if current is not None:
        logits = score(f"B{n}RK,BNRK->B{n}R", query, current.key)[..., None] * factor
        scores.append(
            logits if current.bias is None else logits + current.bias[None, :, None, None]
        )
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    mixed, start = jnp.zeros_like(query), 0
    for kv in cached:
        stop = start + kv.key.shape[2]
        mixed += jnp.einsum(f"B{n}RS,BNSK->B{n}RK", weights[..., start:stop], kv.value)
        start = stop
    if current is not None:
        value = current.value if n == "N" else current.value[:, :, None]
        mixed += weights[..., start:] * value
    # XLA for GPUs would put the sum over values into the product with the output kernel, which it
    # then writes out number by number before it sums.
    return apart(heads_first(mixed.reshape(shape)), 1)[0]


def heads_first(x: Float[Array, "B T N K"]) -> Float[Array, "B N T K"]:
    """Swaps the axes of tokens and heads: [B, T, N, K] to a cache's [B, N, T, K], or back."""
    return x.swapaxes(1, 2)
