"""LLaMA (Vicuna v1.1): one causal row of [visual vectors ; instruction ; answer].

RMS norms, rotary positions on half-split heads, SwiGLU, no biases, an untied head.
"""

import functools
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
from jax_instructblip.models.dense import Head
from jax_instructblip.models.layers import (
    RESIDUAL,
    Dropout,
    GatedMlp,
    RMSNorm,
    Scan,
    constrain,
    scan_layers,
)
from jax_instructblip.models.variants import LlamaConfig

Rotation = tuple[Array, Array]  # cosine and sine, each [B or 1, T, K]


def rotary(positions: Int[Array, "B T"], width: int, theta: float, dtype: Any) -> Rotation:
    """Cosine and sine `[B, T, K]` of each position, computed in float32 and cast to `dtype`.

    K is `width`, that of a head. The angle of pair k is position x theta^(-2k/K); the pairs are (k,
    k + K/2), as in the Hugging Face layout of the weights.
    """
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: Float[Array, "B T N K"], rotation: Rotation) -> Float[Array, "B T N K"]:
    """Rotates queries or keys `x` by their positions; the result has the dtype of `x`."""
    cosine, sine = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    turned = x * cosine + jnp.concatenate([-second, first], axis=-1) * sine
    return turned.astype(x.dtype)


class LlamaLayer(nn.Module):
    """One layer of LLaMA; each method returns (carry, output), as `nn.scan` expects."""

    config: LlamaConfig
    dtype: Any

    def setup(self):
        c = self.config
        self.attention_norm = RMSNorm(c.norm_eps)
        self.attention = Attention(c.width, c.heads, c.head_width, self.dtype)
        self.mlp_norm = RMSNorm(c.norm_eps)
        self.mlp = GatedMlp(c.width, c.mlp, self.dtype, "silu")
        self.drop = Dropout(c.dropout)

    def __call__(self, x, _, mask, rotation, return_kv, train):
        """Runs full sequences `x` [B, T, D]; returns (x, kv), where kv is None unless `return_kv`.

        kv is {"key": ..., "value": ...}, each `[B, N, T, K]` as in a cache.
        """
        dropout = functools.partial(self.drop, deterministic=not train)
        y, attention = self.attention_norm(x), self.attention
        key, value = rotate(attention.key(y), rotation), attention.value(y)
        mixed = attend(rotate(attention.query(y), rotation), key, value, mask, dropout=dropout)
        x = constrain(x + attention.out(mixed))
        x = constrain(x + self.mlp(self.mlp_norm(x)))
        return x, ({"key": heads_first(key), "value": heads_first(value)} if return_kv else None)

    def step(self, x, cache, prefix_mask, view, rotation):
        """Runs each beam's newest token, `x` [B, R, D]; returns (x, what `cache.append` takes)."""
        y, attention = self.attention_norm(x), self.attention
        key, value = (
            heads_first(rotate(attention.key(y), rotation)),
            heads_first(attention.value(y)),
        )
        past, current, output = attend_tail(cache["tail"], {"key": key, "value": value}, view)
        cached = [CachedKV(**cache["prefix"], mask=prefix_mask), past]
        x = constrain(
            x + attention.out(attend_cached(rotate(attention.query(y), rotation), cached, current))
        )
        return constrain(x + self.mlp(self.mlp_norm(x))), output

    def tree(self, x, prefix, prefix_mask, mask, rotation):
        """Runs a tree of tokens `x` [B, T, D] after the cached prompt; returns (x, None)."""
        y, attention = self.attention_norm(x), self.attention
        key, value = (
            heads_first(rotate(attention.key(y), rotation)),
            heads_first(attention.value(y)),
        )
        cached = [CachedKV(**prefix, mask=prefix_mask), CachedKV(key, value, mask)]
        x = constrain(
            x + attention.out(attend_cached(rotate(attention.query(y), rotation), cached))
        )
        return constrain(x + self.mlp(self.mlp_norm(x))), None


class Llama(DecoderOnly):
    """The whole LLaMA model; most methods are in `DecoderOnly`."""

    config: LlamaConfig
    dtype: Any
    scan: Scan = Scan()

    def setup(self):
        c = self.config
        unit = nn.initializers.normal(1.0)
        self.embedding = nn.Embed(
            c.vocab, c.width, embedding_init=unit, dtype=RESIDUAL, name="embed"
        )
        layers = scan_layers(LlamaLayer, c.layers, self.scan, call=4, step=3, tree=3)
        self.layers = layers(c, self.dtype)
        self.norm = RMSNorm(c.norm_eps)
        self.head = Head(c.vocab, self.dtype, by_word=self.scan.unstacked)

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Float32 token embeddings, the start of a residual stream."""
        return constrain(self.embedding(tokens))

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of hidden states after the final norm."""
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
        c = self.config
        return rotary(positions, c.head_width, c.rope_theta, jnp.float32)
