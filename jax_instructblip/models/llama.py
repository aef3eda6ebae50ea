"""LLaMA and its relatives: one causal row of visual vectors and tokens.

RMS norms, rotary positions on half-split heads, SwiGLU. Fields of `LlamaConfig` say in what Vicuna,
Llama 2 and 3, Mistral, Qwen 2 and Qwen 3 differ: fewer key and value heads than query heads, biases
or norms of queries and keys, scaled positions, a head that is the token embedding.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_instructblip.models.attention import (
    Attention,
    CachedKV,
    attend,
    attend_cached,
    heads_first,
)
from jax_instructblip.models.cache import attend_tail
from jax_instructblip.models.decoder_only import DecoderOnly
from jax_instructblip.models.dense import Head, word_logits
from jax_instructblip.models.layers import (
    RESIDUAL,
    Dropout,
    Embedding,
    GatedMlp,
    RMSNorm,
    Scan,
    constrain,
    scan_layers,
)
from jax_instructblip.models.variants import LlamaConfig

Rotation = tuple[Array, Array]  # cosine and sine, each [B or 1, T, K]


def frequencies(config: LlamaConfig) -> Float[Array, " k"]:
    """The angle `[K/2]` by which one position turns each pair: theta^(-2k/K), scaled.

    Linear scaling divides all by `rope_factor`. Llama 3's divides those of long waves, which turn
    less than `rope_low_turns` times within the original positions, keeps those that turn more than
    `rope_high_turns` times, and goes linearly in the number of turns between the two.
    """
    c, width = config, config.head_width
    frequency = c.rope_theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if c.rope_scaling == "none":
        return frequency
    scaled = frequency / c.rope_factor
    if c.rope_scaling == "linear":
        return scaled
    turns = c.rope_original_positions * frequency / (2 * math.pi)
    kept = (turns - c.rope_low_turns) / (c.rope_high_turns - c.rope_low_turns)
    kept = jnp.clip(kept, 0, 1)
    return kept * frequency + (1 - kept) * scaled


def rotary(positions: Int[Array, "B T"], frequency: Float[Array, " k"], dtype: Any) -> Rotation:
    """Cosine and sine `[B, T, K]` of each position, computed in float32 and cast to `dtype`.

    The angle of pair k is position x `frequency[k]`; the pairs are (k, k + K/2), as in the Hugging
    Face layout of the weights.
    """
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: Float[Array, "B T N K"], rotation: Rotation) -> Float[Array, "B T N K"]:
    """Rotates queries or keys `x` by a result of `rotary`; the result has the dtype of `x`."""
    cosine, sine = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    turned = x * cosine + jnp.concatenate([-second, first], axis=-1) * sine
    return turned.astype(x.dtype)


class LlamaLayer(nn.Module):
    """One layer of LLaMA; each method returns (carry, output), as `nn.scan` expects.

    The carry is the residual stream `x`, float32; the scanned argument `_` is None.
    `rotation` is `Llama.rotation` of the positions of `x`. `prefix_mask` `[B, 1, 1, S]` is False on
    padding of the cached prompt.
    """

    config: LlamaConfig
    dtype: Any
    fused: str = ""

    def setup(self):
        c = self.config
        self.attention_norm = RMSNorm(c.norm_eps)
        self.attention = Attention(
            c.width,
            c.heads,
            c.head_width,
            self.dtype,
            biases=("query", "key", "value") if c.key_bias else (),
            key_heads=c.cached_heads,
        )
        if c.key_norm:
            self.query_norm, self.key_norm = RMSNorm(c.norm_eps), RMSNorm(c.norm_eps)
        self.mlp_norm = RMSNorm(c.norm_eps)
        self.mlp = GatedMlp(c.width, c.mlp, self.dtype, "silu")
        self.drop = Dropout(c.dropout)

    def __call__(self, x, _, mask, rotation, return_kv, train):
        """Runs full sequences `x` [B, T, D]; returns (x, kv), where kv is None unless `return_kv`.

        `mask` is as in `attention.attend`. kv is {"key": ..., "value": ...}, each `[B, Nk, T, K]`
        as in a cache.
        """
        drops = train and self.config.dropout > 0
        dropout = functools.partial(self.drop, deterministic=False) if drops else None
        query, key, value = self._project(x, rotation)
        x = self._add(x, attend(query, key, value, mask, dropout=dropout, fused=self.fused))
        return x, ({"key": heads_first(key), "value": heads_first(value)} if return_kv else None)

    def step(self, x, cache, prefix_mask, view, rotation):
        """Runs each beam's newest token, `x` [B, R, D]; returns (x, what `cache.append` takes).

        `cache` is {"prefix": ..., "tail": ...}, this layer's part of each (`cache.py`), `view` the
        `cache.TailView` of the step.
        """
        projected = self.attention.newest(self.attention_norm(x), view.unstacked)
        query, key, value = self._rotated(*projected, rotation)
        token = {"key": heads_first(key), "value": heads_first(value)}
        past, current, output = attend_tail(cache["tail"], token, view)
        cached = [CachedKV(**cache["prefix"], mask=prefix_mask), past]
        return self._add(x, attend_cached(query, cached, current), view.unstacked), output

    def tree(self, x, prefix, prefix_mask, mask, rotation):
        """Runs a tree of tokens `x` [B, T, D] after the cached prompt; returns (x, None).

        `prefix` is the prompt's {"key": ..., "value": ...}, each `[B, Nk, S, K]`; `mask` `[B, 1, T,
        T]` is the `masks.tree_mask` of the tokens.
        """
        projected = self.attention.newest(self.attention_norm(x))
        query, key, value = self._rotated(*projected, rotation)
        own = CachedKV(heads_first(key), heads_first(value), mask)
        cached = [CachedKV(**prefix, mask=prefix_mask), own]
        return self._add(x, attend_cached(query, cached), newest=True), None

    def _project(self, x, rotation):
        """Rotated queries and keys, and values, of the layer's input `x` [B, T, D]."""
        y, attention = self.attention_norm(x), self.attention
        # The order of these lines is that of the sums in the gradient of `y`.
        key, value, query = attention.key(y), attention.value(y), attention.query(y)
        return self._rotated(query, key, value, rotation)

    def _rotated(self, query, key, value, rotation):
        """Queries and keys after their norms, if there are any, and rotation; and the values."""
        if self.config.key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, rotation), rotate(key, rotation), value

    def _add(self, x, mixed, newest=False):
        """The layer's output: `x` plus its attention's result `mixed`, plus the feed-forward."""
        x = constrain(x + self.attention.out(mixed))
        return constrain(x + self.mlp(self.mlp_norm(x), newest=newest))


class Llama(DecoderOnly):
    """The whole LLaMA model; most methods are in `DecoderOnly`."""

    config: LlamaConfig
    dtype: Any
    scan: Scan = Scan()

    def setup(self):
        c = self.config
        unit = nn.initializers.normal(1.0)
        self.embedding = Embedding(c.vocab, c.width, embedding_init=unit, name="embed")
        layers = scan_layers(LlamaLayer, c.layers, self.scan, call=4, step=3, tree=3)
        self.layers = layers(c, self.dtype, self.scan.fused)
        self.norm = RMSNorm(c.norm_eps)
        if not c.tied_head:
            self.head = Head(c.vocab, self.dtype, by_word=self.scan.unstacked)

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Float32 token embeddings, the start of a residual stream."""
        return constrain(self.embedding(tokens))

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of `x`, to which the final norm was applied."""
        if self.config.tied_head:
            return word_logits(x, self.embedding.embedding, "VD", self.dtype)
        return self.head(x)

    def begin(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        """The embedded slots in float32; positions are applied later, to queries and keys."""
        del positions
        return x.astype(RESIDUAL)

    def shared(self, positions: Int[Array, "#B T"]) -> tuple[Any, ...]:
        """The 1-tuple of (cosine, sine) that rotates queries and keys in every layer."""
        return (self.rotation(positions),)

    def rotation(self, positions: Int[Array, "B T"]) -> Rotation:
        """Float32 cosine and sine `[B, T, K]` of `positions`, for heads of this model's width."""
        return rotary(positions, frequencies(self.config), jnp.float32)
