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
        self.drop = Dropout(c.dropout)

    def __call__(self, x, _, mask, bias, encoded, encoded_mask, train):
        """Whole rows; `encoded`, its mask beside it, is what a decoder layer looks at."""
        drop = functools.partial(self.drop, deterministic=not train)
        y = self.attention_norm(x)
        x = constrain(x + drop(self.attention(y, y, mask, bias, scale=1.0, drop=drop)))
        if self.decoder:
            y = self.cross_attention_norm(x)
            y = self.cross_attention(y, encoded, encoded_mask, scale=1.0, drop=drop)
            x = constrain(x + drop(y))
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
        x = constrain(x + own.out(mixed))
        y, cross, prefix = self.cross_attention_norm(x), self.cross_attention, cache["prefix"]
        # The R rows stand where a whole row has its T queries: the prefix is not repeated for them.
        mixed = attend(cross.query(y), prefix["key"], prefix["value"], prefix_mask, scale=1.0)
        x = constrain(x + cross.out(mixed))
        return constrain(x + self.mlp(self.mlp_norm(x))), token

    def tree(self, x, cache, prefix_mask, mask, bias):
        """A tree of tokens `[B, T, D]` behind the written tail; nothing is stored."""
        y, own, tail = self.attention_norm(x), self.attention, cache["tail"]
        key = jnp.concatenate([tail["key"][:, 0], own.key(y)], axis=1)
        value = jnp.concatenate([tail["value"][:, 0], own.value(y)], axis=1)
        mixed = attend(own.query(y), key, value, mask, bias, scale=1.0)
        x = constrain(x + own.out(mixed))
        y, cross, prefix = self.cross_attention_norm(x), self.cross_attention, cache["prefix"]
        mixed = attend(cross.query(y), prefix["key"], prefix["value"], prefix_mask, scale=1.0)
        x = constrain(x + cross.out(mixed))
        return constrain(x + self.mlp(self.mlp_norm(x))), None


class T5Stack(nn.Module):
    """An encoder or a decoder: its bias table, its scanned layers, its norm."""

    config: T5Config
    dtype: Any
    decoder: bool
    scan: Scan = Scan()

    def setup(self):
        c = self.config
        shape = (c.relative_buckets, c.heads)
        self.relative_bias = self.param("relative_bias", nn.initializers.normal(0.02), shape)
        length = c.decoder_layers if self.decoder else c.encoder_layers
        methods = {"call": 5, "look_at": 1, "step": 3, "tree": 3} if self.decoder else {"call": 5}
        layers = scan_layers(T5Layer, length, self.scan, **methods)
        self.layers = layers(c, self.dtype, self.decoder)
        self.norm = RMSNorm(c.norm_eps)
        self.drop = Dropout(c.dropout)

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

    def tree(self, x, depths, ends, cache):
        """A tree of tokens `[B, T, D]` through all layers and the norm, behind the written tail."""
        length, step = cache["tail"]["key"].shape[3], cache["step"]
        own = tree_mask(ends)
        behind = jnp.broadcast_to(written_mask(step, length), (*own.shape[:3], length))
        places = step - 1 + depths
        slots = jnp.broadcast_to(jnp.arange(length), (places.shape[0], length))
        distance = jnp.concatenate([slots, places], axis=1)[:, None, :] - places[:, :, None]
        x, _ = self.layers.tree(
            x,
            {"prefix": cache["prefix"], "tail": cache["tail"]},
            padding_mask(cache["prefix_mask"]),
            jnp.concatenate([behind, own], axis=-1),
            jnp.moveaxis(self.bias(distance), 0, 1),
        )
        return self.norm(x)


class T5(nn.Module):
    """The whole language model; same methods as `llama.Llama`."""

    config: T5Config
    dtype: Any
    scan: Scan = Scan()

    def setup(self):
        c = self.config
        unit = nn.initializers.normal(1.0)
        self.embedding = nn.Embed(
            c.vocab, c.width, embedding_init=unit, dtype=self.dtype, name="embed"
        )
        self.encoder = T5Stack(c, self.dtype, decoder=False, scan=self.scan)
        self.decoder = T5Stack(c, self.dtype, decoder=True, scan=self.scan)
        self.head = Head(c.vocab, self.dtype)

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Token embeddings in the compute dtype."""
        return constrain(self.embedding(tokens))

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

    def decode_tree(
        self,
        tokens: Int[Array, "#B T"],
        depths: Int[Array, "#B T"],
        ends: Int[Array, "#B T"],
        cache: dict[str, Any],
    ) -> Float[Array, "B T D"]:
        """Normed hidden states of a tree of continuations; `logits` makes logits of them.

        The tree stands in depth-first order. Each token sees the prompt, the start id, the tokens
        that lead to it (`tree_mask(ends)`) and itself; its depth is 1 where it follows the start
        id. `cache` is that of `prefill`, before any further step, and is only read.
        """
        shape = (cache["prefix_mask"].shape[0], tokens.shape[1], self.config.width)
        x = constrain(jnp.broadcast_to(self.embed(tokens), shape))
        return self.decoder.tree(x, depths, ends, cache)
