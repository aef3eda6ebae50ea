"""LLaMA (Vicuna v1.1): one causal row of [visual prompt ; instruction ; answer].

RMS norms, rotary positions on half-split heads, SwiGLU, no biases, an untied head.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.attention import (
    Attention,
    CachedKV,
    attend,
    attend_cached,
    heads_first,
)
from jax_instructblip.models.cache import append, attend_tail, start, tail_view
from jax_instructblip.models.dense import Head
from jax_instructblip.models.layers import (
    RESIDUAL,
    Dropout,
    GatedMlp,
    Network,
    RMSNorm,
    Scan,
    constrain,
    scan_layers,
    take_slots,
    unique_inverse,
    zip_layers,
)
from jax_instructblip.models.masks import causal_mask, padding_mask, tree_mask
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
    """`x` turned by its position, in the dtype of the rotation; the result has that of `x`."""
    cosine, sine = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    turned = x * cosine + jnp.concatenate([-second, first], axis=-1) * sine
    return turned.astype(x.dtype)


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

    def __call__(self, x, _, mask, rotation, return_kv, train):
        """Runs whole rows; with `return_kv` keys and values come back as a cache has them."""
        dropout = functools.partial(self.drop, deterministic=not train)
        y, attention = self.attention_norm(x), self.attention
        key, value = rotate(attention.key(y), rotation), attention.value(y)
        mixed = attend(rotate(attention.query(y), rotation), key, value, mask, dropout=dropout)
        x = constrain(x + attention.out(mixed))
        x = constrain(x + self.mlp(self.mlp_norm(x)))
        return x, ({"key": heads_first(key), "value": heads_first(value)} if return_kv else None)

    def step(self, x, cache, prefix_mask, view, rotation):
        """Runs one token `[B, R, D]`; what `attend_tail` returns comes back, for `append`."""
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
        """Runs a tree of tokens `[B, T, D]` behind the prompt; nothing is stored."""
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


class Llama(Network):
    """The whole language model; same methods as `t5.T5`."""

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
        """Token embeddings, the beginning of a residual stream."""
        return constrain(self.embedding(tokens))

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of normed hidden states."""
        return self.head(x)

    def hidden(
        self, inputs: Array, segments: Array, positions: Array, return_kv: bool, train: bool
    ) -> tuple[Array, Any]:
        """Normed hidden states `[B, X, D]`; keys and values of all layers where `return_kv`."""
        mask, rotation = causal_mask(segments), self.rotation(positions)
        x, cache = self.layers(inputs.astype(RESIDUAL), None, mask, rotation, return_kv, train)
        return self.norm(x), cache

    def rotation(self, positions: Int[Array, "B T"]) -> Rotation:
        """Cosine and sine of `positions` for the heads of this model."""
        c = self.config
        return rotary(positions, c.head_width, c.rope_theta, jnp.float32)

    def __call__(
        self,
        inputs: Float[Array, "B X D"],
        segments: Int[Array, "B X"],
        positions: Int[Array, "B X"],
        asked: Int[Array, "B A"],
        decoder_tokens: None = None,
        decoder_segments: None = None,
        train: bool = False,
    ) -> Float[Array, "B A V"]:
        """Logits `[B, A, V]`: those of slot t tell the token after it.

        `inputs` are the embedded slots, `segments` the sample that owns each (0: padding),
        `positions` its place in the sample. Slots that nobody asked for get no logits.
        `decoder_tokens` and `decoder_segments` are of the encoder-decoders: none here.
        """
        del decoder_tokens, decoder_segments
        x, _ = self.hidden(inputs, segments, positions, return_kv=False, train=train)
        return self.head(take_slots(x, asked, unique_inverse(asked, x.shape[1])))

    def prefill(
        self, inputs: Float[Array, "B S D"], valid: Bool[Array, "B S"], tail_length: int
    ) -> tuple[Float[Array, "B 1 V"], dict[str, Any]]:
        """Logits of the first new token, and the cache with room for `tail_length` new ones."""
        positions = jnp.arange(inputs.shape[1])[None]
        x, prefix = self.hidden(
            inputs, valid.astype(jnp.int32), positions, return_kv=True, train=False
        )
        last = valid.sum(axis=1) - 1  # padding stands at the end only
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return self.head(x), start(prefix, valid, tail_length)

    def decode_step(
        self, token: Int[Array, "B R"], cache: dict[str, Any]
    ) -> tuple[Float[Array, "B R V"], dict[str, Any]]:
        """Logits of the token after `token`, and the cache with `token` written to its tail."""
        valid = cache["prefix_mask"]
        positions = jnp.broadcast_to(valid.sum(axis=1, keepdims=True) + cache["step"], token.shape)
        x, outputs = self.layers.step(
            self.embed(token),
            zip_layers(prefix=cache["prefix"], tail=cache["tail"]),
            padding_mask(valid),
            tail_view(cache),
            self.rotation(positions),
        )
        return self.head(self.norm(x)), append(cache, outputs)

    def decode_tree(
        self,
        tokens: Int[Array, "#B T"],
        depths: Int[Array, "#B T"],
        ends: Int[Array, "#B T"],
        cache: dict[str, Any],
    ) -> Float[Array, "B T D"]:
        """Normed hidden states of a tree of continuations; `logits` makes logits of them.

        The tree stands in depth-first order. Each token sees the prompt, the tokens that lead to it
        (`tree_mask(ends)`) and itself; its depth is 1 where it follows the prompt, and `ends[b, t]`
        is the index behind all that hangs below token t. `cache` is that of `prefill`, before any
        step, and is only read.
        """
        valid, inner = cache["prefix_mask"], tokens.shape[1]
        shape = (valid.shape[0], inner, self.config.width)
        x, _ = self.layers.tree(
            constrain(jnp.broadcast_to(self.embed(tokens), shape)),
            cache["prefix"],
            padding_mask(valid),
            tree_mask(ends),
            self.rotation(valid.sum(axis=1, keepdims=True) + depths - 1),
        )
        return self.norm(x)
