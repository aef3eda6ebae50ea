"""LLaMA (Vicuna v1.1): one causal row of [visual prompt ; instruction ; answer].

RMS norms, rotary positions on half-split heads, SwiGLU, no biases, an untied head.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.attention import Attention, attend, attend_cached, write_tail
from jax_instructblip.models.layers import (
    Dropout,
    GatedMlp,
    Head,
    RMSNorm,
    Scan,
    constrain,
    scan_layers,
)
from jax_instructblip.models.masks import causal_mask, padding_mask, tree_mask, written_mask
from jax_instructblip.models.variants import LlamaConfig

Rotation = tuple[Array, Array]  # cosine and sine, each [B or 1, T, K]


def rotary(positions: Int[Array, "B T"], width: int, theta: float, dtype: Any) -> Rotation:
    """Cosine and sine `[B, T, K]` of each position, computed in float32 and cast to `dtype`.

    The angle of pair k is position x theta^(-2k/K); the pairs are (k, k + K/2), as in the
    Hugging Face layout of the weights.
    """
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: Float[Array, "B T N K"], rotation: Rotation) -> Float[Array, "B T N K"]:
    """`x` turned by its position."""
    cosine, sine = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cosine + jnp.concatenate([-second, first], axis=-1) * sine


class LlamaLayer(nn.Module):
    """One layer; each method returns what a scan carries and what it stacks."""

    config: LlamaConfig
    dtype: Any

    def setup(self):
        c = self.config
        self.attention_norm = RMSNorm(c.norm_eps)
        self.attention = Attention(c.width, c.heads, c.head_width, self.dtype)
        self.mlp_norm = RMSNorm(c.norm_eps)
        self.mlp = GatedMlp(c.width, c.mlp, self.dtype, "silu")
        self.drop = Dropout(c.dropout)

    def __call__(self, x, _, mask, rotation, keep, train):
        """Whole rows; the keys and values come back where `keep` asks for them (prefill)."""
        drop = functools.partial(self.drop, deterministic=not train)
        y, own = self.attention_norm(x), self.attention
        key, value = rotate(own.key(y), rotation), own.value(y)
        mixed = attend(rotate(own.query(y), rotation), key, value, mask, drop=drop)
        x = constrain(x + own.out(mixed))
        x = constrain(x + self.mlp(self.mlp_norm(x)))
        return x, ({"key": key, "value": value} if keep else None)

    def step(self, x, cache, prefix_mask, tail_mask, rotation):
        """One token `[B, R, D]`; its own key and value come back, for the caller to store."""
        y, own = self.attention_norm(x), self.attention
        token = {"key": rotate(own.key(y), rotation), "value": own.value(y)}
        query = rotate(own.query(y), rotation)
        mixed = attend_cached(query, token, cache["tail"], tail_mask, cache["prefix"], prefix_mask)
        x = constrain(x + own.out(mixed))
        return constrain(x + self.mlp(self.mlp_norm(x))), token

    def tree(self, x, prefix, mask, rotation):
        """A tree of tokens `[B, T, D]` behind the prompt; nothing is stored."""
        y, own = self.attention_norm(x), self.attention
        key = jnp.concatenate([prefix["key"], rotate(own.key(y), rotation)], axis=1)
        value = jnp.concatenate([prefix["value"], own.value(y)], axis=1)
        mixed = attend(rotate(own.query(y), rotation), key, value, mask)
        x = constrain(x + own.out(mixed))
        return constrain(x + self.mlp(self.mlp_norm(x))), None


class Llama(nn.Module):
    """The whole language model; same methods as `t5.T5`."""

    config: LlamaConfig
    dtype: Any
    scan: Scan = Scan()

    def setup(self):
        c = self.config
        unit = nn.initializers.normal(1.0)
        self.embedding = nn.Embed(
            c.vocab, c.width, embedding_init=unit, dtype=self.dtype, name="embed"
        )
        layers = scan_layers(LlamaLayer, c.layers, self.scan, call=4, step=3, tree=2)
        self.layers = layers(c, self.dtype)
        self.norm = RMSNorm(c.norm_eps)
        self.head = Head(c.vocab, self.dtype)

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Token embeddings in the compute dtype."""
        return constrain(self.embedding(tokens))

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of normed hidden states."""
        return self.head(x)

    def hidden(self, inputs: Array, real: Array, keep: bool, train: bool) -> tuple[Array, Any]:
        """Normed hidden states `[B, S, D]`; keys and values `[Y, B, S, N, K]` where `keep`."""
        rotation = self.rotation(jnp.arange(inputs.shape[1])[None])
        x, cache = self.layers(inputs, None, causal_mask(real), rotation, keep, train)
        return self.norm(x), cache

    def rotation(self, positions: Int[Array, "B T"]) -> Rotation:
        """Cosine and sine of `positions` for the heads of this model."""
        c = self.config
        return rotary(positions, c.head_width, c.rope_theta, self.dtype)

    def __call__(
        self,
        inputs: Float[Array, "B S D"],
        real: Bool[Array, "B S"],
        decoder_tokens: None = None,
        skip: int = 0,
        train: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits `[B, S - skip, V]`: position t tells the token after t.

        `inputs` are the embedded [visual prompt ; instruction ; answer], `real` is False on
        padding. The first `skip` positions (the visual prompt, never a target) get no logits.
        `decoder_tokens` are of the encoder-decoders: none here.
        """
        del decoder_tokens
        x, _ = self.hidden(inputs, real, keep=False, train=train)
        return self.head(x[:, skip:])

    def prefill(
        self, inputs: Float[Array, "B S D"], real: Bool[Array, "B S"], tail_length: int
    ) -> tuple[Float[Array, "B 1 V"], dict[str, Any]]:
        """Logits of the first new token, and the cache with room for `tail_length` new tokens.

        prefix       key, value  [Y, B, S, N, K]     the prompt, shared by the R rows of a sample
        prefix_mask              [B, S]
        tail         key, value  [Y, B, R, T, N, K]  R = 1 here; T = tail_length
        step                     []                  slots of the tail written so far
        """
        x, prefix = self.hidden(inputs, real, keep=True, train=False)
        last = real.sum(axis=1) - 1  # padding stands at the end only
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        c = self.config
        shape = (c.layers, inputs.shape[0], 1, tail_length, c.heads, c.head_width)
        cache = {
            "prefix": prefix,
            "prefix_mask": real,
            "tail": {name: jnp.zeros(shape, self.dtype) for name in ("key", "value")},
            "step": jnp.zeros((), jnp.int32),
        }
        return self.head(x), cache

    def decode_step(
        self, token: Int[Array, "B R"], cache: dict[str, Any]
    ) -> tuple[Float[Array, "B R V"], dict[str, Any]]:
        """Logits of the token after `token`, and the cache with `token` written to its tail."""
        real, step = cache["prefix_mask"], cache["step"]
        positions = jnp.broadcast_to(real.sum(axis=1, keepdims=True) + step, token.shape)
        x, new = self.layers.step(
            self.embed(token),
            {"prefix": cache["prefix"], "tail": cache["tail"]},
            padding_mask(real),
            written_mask(step, cache["tail"]["key"].shape[3]),
            self.rotation(positions),
        )
        tail = write_tail(cache["tail"], new, step)
        return self.head(self.norm(x)), {**cache, "tail": tail, "step": step + 1}

    def decode_tree(
        self,
        tokens: Int[Array, "#B T"],
        depths: Int[Array, "#B T"],
        ends: Int[Array, "#B T"],
        cache: dict[str, Any],
    ) -> Float[Array, "B T D"]:
        """Normed hidden states of a tree of continuations; `logits` makes logits of them.

        The tree stands in depth-first order. Each token sees the prompt, the tokens that lead to it
        (`tree_mask(ends)`) and itself; its depth is 1 where it follows the prompt. `cache` is that
        of `prefill`, before any step, and is only read.
        """
        real = cache["prefix_mask"]
        (batch, length), inner = real.shape, tokens.shape[1]
        seen = jnp.broadcast_to(padding_mask(real), (batch, 1, inner, length))
        own = jnp.broadcast_to(tree_mask(ends), (batch, 1, inner, inner))
        x, _ = self.layers.tree(
            constrain(jnp.broadcast_to(self.embed(tokens), (batch, inner, self.config.width))),
            cache["prefix"],
            jnp.concatenate([seen, own], axis=-1),
            self.rotation(real.sum(axis=1, keepdims=True) + depths - 1),
        )
        return self.norm(x)
