"""FlanT5: encoder over [visual prompt ; instruction], decoder over the answer.

Unscaled attention scores, no biases, RMS norms before each sub-layer, one relative position bias a
stack (computed once, shared by its layers), a gated feed-forward and an untied head.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.attention import (
    Attention,
    attend,
    attend_cached,
    write_tail,
)
from jax_instructblip.models.layers import GatedMlp, Head, RMSNorm, constrain, scan_layers
from jax_instructblip.models.masks import causal_mask, padding_mask, written_mask
from jax_instructblip.models.variants import T5Config


def relative_bucket(
    distance: Int[Array, "*S"], buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array, "*S"]:
    """The bias bucket of `distance` = key position - query position.

    The nearer half of the buckets is exact, the rest grows with the logarithm up to `max_distance`;
    the encoder keeps one set for each sign, the decoder looks back only.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        behind = jnp.abs(distance)
    else:
        behind = jnp.maximum(-distance, 0)
    exact = buckets // 2
    growth = jnp.log(jnp.maximum(behind, 1) / exact) / math.log(max_distance / exact)
    far = exact + (growth * (buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(behind < exact, behind, jnp.minimum(far, buckets - 1))


class T5Layer(nn.Module):
    """One encoder or decoder layer; each method returns what a scan carries and what it stacks."""

    config: T5Config
    dtype: Any
    decoder: bool

    def setup(self):
        c = self.config
        attention = functools.partial(Attention, c.width, c.heads, c.head_width, self.dtype)
        self.attention_norm = RMSNorm(c.norm_eps)
        self.attention = attention()
        if self.decoder:
            self.cross_attention_norm = RMSNorm(c.norm_eps)
            self.cross_attention = attention()
        self.mlp_norm = RMSNorm(c.norm_eps)
        self.mlp = GatedMlp(c.width, c.mlp, self.dtype, c.activation, c.dropout)
        self.drop = nn.Dropout(c.dropout)

    def __call__(self, x, _, mask, bias, encoded, encoded_mask, train):
        """Whole rows; `encoded`, its mask beside it, is what a decoder layer looks at."""
        drop = functools.partial(self.drop, deterministic=not train)
        y = self.attention_norm(x)
        x = x + drop(self.attention(y, y, mask, bias, scale=1.0, drop=drop))
        if self.decoder:
            y = self.cross_attention_norm(x)
            y = self.cross_attention(y, encoded, encoded_mask, scale=1.0, drop=drop)
            x = x + drop(y)
        return constrain(x + drop(self.mlp(self.mlp_norm(x), train))), None

    def look_at(self, carry, _, encoded):
        """Keys and values of the encoder's output, computed once an answer: the cached prefix."""
        cross = self.cross_attention
        return carry, {"key": cross.key(encoded), "value": cross.value(encoded)}

    def step(self, x, cache, prefix_mask, tail_mask, bias):
        """One token `[B, R, D]`; its own key and value come back, for the caller to store."""
        y, own = self.attention_norm(x), self.attention
        token = {"key": own.key(y), "value": own.value(y)}
        mixed = attend_cached(own.query(y), token, cache["tail"], tail_mask, bias=bias, scale=1.0)
        x = x + own.out(mixed)
        y, cross, prefix = self.cross_attention_norm(x), self.cross_attention, cache["prefix"]
        # The R rows stand where a whole row has its T queries: the prefix is not repeated for them.
        mixed = attend(cross.query(y), prefix["key"], prefix["value"], prefix_mask, scale=1.0)
        x = x + cross.out(mixed)
        return x + self.mlp(self.mlp_norm(x)), token


class T5Stack(nn.Module):
    """An encoder or a decoder: its bias table, its scanned layers, its norm."""

    config: T5Config
    dtype: Any
    decoder: bool

    def setup(self):
        c = self.config
        shape = (c.relative_buckets, c.heads)
        self.relative_bias = self.param("relative_bias", nn.initializers.normal(0.02), shape)
        length = c.decoder_layers if self.decoder else c.encoder_layers
        methods = {"call": 5, "look_at": 1, "step": 3} if self.decoder else {"call": 5}
        self.layers = scan_layers(T5Layer, length, **methods)(c, self.dtype, self.decoder)
        self.norm = RMSNorm(c.norm_eps)
        self.drop = nn.Dropout(c.dropout)

    def bias(self, distance: Int[Array, "*T S"]) -> Float[Array, "N *T S"]:
        """The bias of every head for `distance` = key position - query position, float32."""
        c = self.config
        bidirectional = not self.decoder
        buckets = relative_bucket(
            distance, c.relative_buckets, c.relative_max_distance, bidirectional
        )
        return jnp.moveaxis(self.relative_bias.astype(jnp.float32)[buckets], -1, 0)

    def __call__(self, x, mask, encoded=None, encoded_mask=None, train=False):
        """Whole rows `[B, T, D]` through all layers and the norm."""
        index = jnp.arange(x.shape[1])
        bias = self.bias(index[None, :] - index[:, None])[None]  # [1, N, T, T]
        drop = functools.partial(self.drop, deterministic=not train)
        x, _ = self.layers(drop(x), None, mask, bias, encoded, encoded_mask, train)
        return drop(self.norm(x))

    def look_at(self, encoded):
        """The cached prefix of all layers: keys and values `[Y, B, S, N, K]`."""
        return self.layers.look_at(jnp.zeros((), self.dtype), None, encoded)[1]

    def step(self, x, cache):
        """One token `[B, R, D]` through all layers, and its keys and values `[Y, B, R, N, K]`."""
        length, step = cache["tail"]["key"].shape[3], cache["step"]
        slots = jnp.append(jnp.arange(length), step)  # the token itself comes last
        x, token = self.layers.step(
            x,
            {"prefix": cache["prefix"], "tail": cache["tail"]},
            padding_mask(cache["prefix_mask"]),
            written_mask(step, length),
            self.bias(slots - step),
        )
        return self.norm(x), token


class T5(nn.Module):
    """The whole language model; same methods as `llama.Llama`."""

    config: T5Config
    dtype: Any

    def setup(self):
        c = self.config
        unit = nn.initializers.normal(1.0)
        self.embedding = nn.Embed(
            c.vocab, c.width, embedding_init=unit, dtype=self.dtype, name="embed"
        )
        self.encoder = T5Stack(c, self.dtype, decoder=False)
        self.decoder = T5Stack(c, self.dtype, decoder=True)
        self.head = Head(c.vocab, self.dtype)

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Token embeddings in the compute dtype."""
        return self.embedding(tokens)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of hidden states."""
        if self.config.scale_decoder_outputs:
            x = x * self.config.width**-0.5
        return self.head(x)

    def __call__(
        self,
        inputs: Float[Array, "B S D"],
        real: Bool[Array, "B S"],
        decoder_tokens: Int[Array, "B U"],
        skip: int = 0,
        train: bool = False,
    ) -> Float[Array, "B U V"]:
        """Logits `[B, U, V]` of the answer, aligned with `decoder_tokens` (targets shifted right).

        `inputs` are the embedded [visual prompt ; instruction], `real` is False on padding. `skip`
        is of the decoder-only models: all logits here belong to the answer.
        """
        del skip
        seen = padding_mask(real)
        encoded = self.encoder(inputs, seen, train=train)
        causal = causal_mask(jnp.ones(decoder_tokens.shape, bool))
        x = self.decoder(self.embed(decoder_tokens), causal, encoded, seen, train=train)
        return self.logits(x)

    def prefill(
        self, inputs: Float[Array, "B S D"], real: Bool[Array, "B S"], tail_length: int
    ) -> tuple[Float[Array, "B 1 V"], dict[str, Any]]:
        """Logits of the first new token, and the cache with room for `tail_length` new tokens.

        prefix       key, value  [Y, B, S, N, K]     the encoder's output as each layer sees it
        prefix_mask              [B, S]
        tail         key, value  [Y, B, R, T, N, K]  R = 1 here; T = tail_length + 1 (start)
        step                     []                  slots of the tail written so far
        """
        encoded = self.encoder(inputs, padding_mask(real))
        c, batch = self.config, inputs.shape[0]
        shape = (c.decoder_layers, batch, 1, tail_length + 1, c.heads, c.head_width)
        cache = {
            "prefix": self.decoder.look_at(encoded),
            "prefix_mask": real,
            "tail": {name: jnp.zeros(shape, self.dtype) for name in ("key", "value")},
            "step": jnp.zeros((), jnp.int32),
        }
        return self.decode_step(jnp.full((batch, 1), c.decoder_start_id, jnp.int32), cache)

    def decode_step(
        self, token: Int[Array, "B R"], cache: dict[str, Any]
    ) -> tuple[Float[Array, "B R V"], dict[str, Any]]:
        """Logits of the token after `token`, and the cache with `token` written to its tail."""
        x, new = self.decoder.step(self.embed(token), cache)
        tail = write_tail(cache["tail"], new, cache["step"])
        return self.logits(x), {**cache, "tail": tail, "step": cache["step"] + 1}
