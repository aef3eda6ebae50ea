"""FlanT5: the encoder reads [visual vectors ; instruction], the decoder writes the answer.

Unscaled attention scores, no biases, RMS norms before each sub-layer, one relative position bias
per stack (computed once, shared by its layers), a gated feed-forward and an untied head. A stack is
the encoder or the decoder.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.attention import Attention, CachedKV, attend_cached, heads_first
from jax_instructblip.models.cache import append, attend_tail, start, tail_view
from jax_instructblip.models.dense import Head, WordFactors, apart
from jax_instructblip.models.layers import (
    RESIDUAL,
    Dropout,
    Embedding,
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
from jax_instructblip.models.masks import (
    causal_mask,
    lineage_mask,
    padding_mask,
    segment_mask,
    tree_mask,
)
from jax_instructblip.models.variants import T5Config


def relative_bucket(
    distance: Int[Array, "*S"], buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array, "*S"]:
    """The index into the table of relative position biases for `distance` = key - query position.

    The nearest distances have a bucket each; farther ones share buckets that grow logarithmically
    up to `max_distance`. With `bidirectional` (the encoder) each sign of the distance has half the
    buckets; otherwise (the decoder) only keys before the query are told apart.
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
    """One encoder or decoder layer; each method returns (carry, output), as `nn.scan` expects.

    The carry is the residual stream `x`, float32; the scanned argument `_` is None.
    `prefix_mask` `[B, 1, 1, S]` is False on padding of the cached encoder output. `cache` is
    {"prefix": ..., "tail": ...}, this layer's part of each (`cache.py`).
    """

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
        """Runs full sequences `x` [B, T, D]; a decoder layer also attends to `encoded` [B, S, D].

        `mask` and `bias` [1, N, T, T] are those of self-attention, `encoded_mask` that of
        cross-attention, as in `attention.attend`. Returns (x, None).
        """
        dropout = functools.partial(self.drop, deterministic=not train)
        y = self.attention_norm(x)
        x = constrain(x + dropout(self.attention(y, y, mask, bias, scale=1.0, dropout=dropout)))
        if self.decoder:
            y = self.cross_attention_norm(x)
            y = self.cross_attention(y, encoded, encoded_mask, scale=1.0, dropout=dropout)
            x = constrain(x + dropout(y))
        return constrain(x + dropout(self.mlp(self.mlp_norm(x), train))), None

    def cross_kv(self, carry, _, encoded):
        """Returns (carry unchanged, cross-attention keys and values of `encoded` [B, S, D]).

        The keys and values are computed once per answer and become the cache's prefix.
        """
        cross = self.cross_attention
        return carry, {
            "key": heads_first(cross.key(encoded)),
            "value": heads_first(cross.value(encoded)),
        }

    def step(self, x, cache, prefix_mask, view):
        """Runs each beam's newest token, `x` [B, R, D]; returns (x, what `cache.append` takes).

        `view` is the `cache.TailView` of the step.
        """
        query, key, value = self.attention.newest(self.attention_norm(x), view.unstacked)
        token = {"key": heads_first(key), "value": heads_first(value)}
        past, current, output = attend_tail(cache["tail"], token, view)
        mixed = attend_cached(query, [past], current, scale=1.0)
        x = constrain(x + self.attention.out(mixed))
        return self._rest(x, cache["prefix"], prefix_mask, view.unstacked), output

    def tree(self, x, cache, prefix_mask, masks, biases):
        """Runs a tree of tokens `x` [B, T, D] after the cached ones; returns (x, None).

        `masks` and `biases` are pairs: for the cached tokens ([B, 1, 1, S] and [B, N, T, S]), and
        for the tree itself ([B, 1, T, T] and [B, N, T, T]); each B may be 1.
        """
        query, key, value = self.attention.newest(self.attention_norm(x))
        cached = [
            CachedKV(**cache["tail"], mask=masks[0], bias=biases[0]),
            CachedKV(heads_first(key), heads_first(value), masks[1], biases[1]),
        ]
        x = constrain(x + self.attention.out(attend_cached(query, cached, scale=1.0)))
        return self._rest(x, cache["prefix"], prefix_mask, newest=True), None

    def _rest(self, x, prefix, prefix_mask, newest):
        """The rest of a layer after self-attention: cross-attention and feed-forward."""
        cross = self.cross_attention
        y = apart(self.cross_attention_norm(x).astype(self.dtype), 1)[0]
        mixed = attend_cached(cross.query(y), [CachedKV(**prefix, mask=prefix_mask)], scale=1.0)
        x = constrain(x + cross.out(mixed))
        return constrain(x + self.mlp(self.mlp_norm(x), newest=newest))


class T5Stack(nn.Module):
    """The encoder or the decoder: its relative position biases, layers and final norm."""

    config: T5Config
    dtype: Any
    decoder: bool
    scan: Scan = Scan()

    def setup(self):
        c = self.config
        shape = (c.relative_buckets, c.heads)
        self.relative_bias = self.param("relative_bias", nn.initializers.normal(0.02), shape)
        length = c.decoder_layers if self.decoder else c.encoder_layers
        methods = {"call": 5, "cross_kv": 1, "step": 2, "tree": 3} if self.decoder else {"call": 5}
        layers = scan_layers(T5Layer, length, self.scan, **methods)
        self.layers = layers(c, self.dtype, self.decoder)
        self.norm = RMSNorm(c.norm_eps)
        self.drop = Dropout(c.dropout)

    def bias(self, distance: Int[Array, "*T S"]) -> Float[Array, "N *T S"]:
        """Float32 position bias of every head; `distance` is key position - query position."""
        c = self.config
        bidirectional = not self.decoder
        buckets = relative_bucket(
            distance, c.relative_buckets, c.relative_max_distance, bidirectional
        )
        return jnp.moveaxis(self.relative_bias.astype(jnp.float32)[buckets], -1, 0)

    def __call__(self, x, mask, encoded=None, encoded_mask=None, train=False):
        """Hidden states [B, T, D] of the full sequences `x` [B, T, D], after the final norm.

        `x` are embeddings. The decoder also attends to `encoded` [B, S, D], the encoder's hidden
        states; the encoder has no `encoded`. `mask` is that of self-attention,
        `encoded_mask` that of cross-attention, as in `attention.attend`.
        """
        index = jnp.arange(x.shape[1])
        bias = self.bias(index[None, :] - index[:, None])[None]  # [1, N, T, T]
        dropout = functools.partial(self.drop, deterministic=not train)
        x, _ = self.layers(
            dropout(x.astype(RESIDUAL)), None, mask, bias, encoded, encoded_mask, train
        )
        return dropout(self.norm(x))

    def cross_kv(self, encoded):
        """Keys and values of the encoder output [B, S, D] for each decoder layer's cross-attention.

        They are stacked over layers, or a tuple of one tree per layer if these are unstacked.
        """
        return self.layers.cross_kv(jnp.zeros((), self.dtype), None, encoded)[1]

    def step(self, x, cache):
        """Runs the newest token of each beam, `x` [B, R, D], through all layers and the final norm.

        `cache` is the whole cache (`cache.py`). Returns the hidden states, and the layers' outputs
        for `cache.append`.
        """
        (rows, length), step = cache["lineage"].shape[1:], cache["step"]
        bias = self.bias(jnp.append(jnp.arange(length), step) - step)  # the token comes last
        past = jnp.repeat(bias[:, :-1], rows, axis=1)[None, :, None]
        x, outputs = self.layers.step(
            x,
            zip_layers(prefix=cache["prefix"], tail=cache["tail"]),
            padding_mask(cache["prefix_mask"]),
            tail_view(cache)._replace(past=past, newest=bias[:, -1]),
        )
        return self.norm(x), outputs

    def tree(self, x, depths, ends, cache):
        """Runs a tree of tokens `x` [B, T, D], after the cached ones, through all layers.

        Returns the hidden states after the final norm; caches nothing. `depths`, `ends` and `cache`
        are as in `T5.decode_tree`.
        """
        length, step = cache["lineage"].shape[2], cache["step"]
        positions = step - 1 + depths
        apart = lambda keys: jnp.moveaxis(self.bias(keys[:, None, :] - positions[:, :, None]), 0, 1)
        x, _ = self.layers.tree(
            x,
            zip_layers(prefix=cache["prefix"], tail=cache["tail"]),
            padding_mask(cache["prefix_mask"]),
            (lineage_mask(cache["lineage"], step), tree_mask(ends)),
            (apart(jnp.arange(length)[None]), apart(positions)),
        )
        return self.norm(x)


class T5(Network):
    """The whole T5 model, with the methods of `protocols.LanguageModel`."""

    config: T5Config
    dtype: Any
    scan: Scan = Scan()

    def setup(self):
        c = self.config
        unit = nn.initializers.normal(1.0)
        self.embedding = Embedding(c.vocab, c.width, embedding_init=unit, name="embed")
        # The encoder runs once per answer: unstacking its layers would gain nothing.
        stacked = dataclasses.replace(self.scan, unstacked=False)
        self.encoder = T5Stack(c, self.dtype, decoder=False, scan=stacked)
        self.decoder = T5Stack(c, self.dtype, decoder=True, scan=self.scan)
        self.head = Head(c.vocab, self.dtype, by_word=self.scan.unstacked)

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Float32 token embeddings, the start of a residual stream."""
        return constrain(self.embedding(tokens))

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of hidden states after the final norm."""
        return self.head(self._scaled(x))

    def factors(self, x: Float[Array, "*B D"]) -> WordFactors:
        """The two factors whose product is `logits`: scaled hidden states, the head's kernel."""
        return WordFactors(self._scaled(x), self.variables["params"]["head"]["kernel"], "DV")

    def _scaled(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Hidden states as the head takes them."""
        return x * self.config.width**-0.5 if self.config.scale_decoder_outputs else x

    def asked_states(
        self,
        inputs: Float[Array, "B X D"],
        segments: Int[Array, "B X"],
        positions: Int[Array, "B X"],
        asked: Int[Array, "B A"],
        decoder_tokens: Int[Array, "B U"],
        decoder_segments: Int[Array, "B U"],
        train: bool = False,
    ) -> Float[Array, "B A D"]:
        """Hidden states of the decoder's tokens at the indices `asked`, which `logits` takes.

        `inputs` are the encoder's embedded tokens and visual vectors, `segments` the number of the
        sample that owns each (0: padding). `decoder_tokens` are the targets shifted right, with
        sample numbers of their own. An index in `asked` that is out of range (padding) gives zeros.
        `positions` is ignored: the position bias depends on distances, and a sample has no gaps.
        """
        del positions
        encoded = self.encoder(inputs, segment_mask(segments, segments), train=train)
        causal, cross = causal_mask(decoder_segments), segment_mask(decoder_segments, segments)
        x = self.decoder(self.embed(decoder_tokens), causal, encoded, cross, train=train)
        return take_slots(x, asked, unique_inverse(asked, x.shape[1]))

    def __call__(self, *row: Any, **options: Any) -> Float[Array, "B A V"]:
        """Logits of the decoder's tokens `asked`; the arguments are those of `asked_states`."""
        return self.logits(self.asked_states(*row, **options))

    def prefill(
        self, inputs: Float[Array, "B S D"], valid: Bool[Array, "B S"], tail_length: int
    ) -> tuple[Float[Array, "B 1 V"], dict[str, Any]]:
        """Logits of the first new token, and a cache with space for `tail_length` new tokens.

        `inputs` are embedded prompts, `valid` is False on padding. The cache has space for one
        token more, the decoder's start id, which is already in it.
        """
        encoded = self.encoder(inputs, padding_mask(valid))
        cache = start(self.decoder.cross_kv(encoded), valid, tail_length + 1)
        token = jnp.full((inputs.shape[0], 1), self.config.decoder_start_id, jnp.int32)
        return self.decode_step(token, cache)

    def decode_step(
        self, token: Int[Array, "B R"], cache: dict[str, Any]
    ) -> tuple[Float[Array, "B R V"], dict[str, Any]]:
        """Logits of the token after `token`, and the cache with `token` added; R are beams."""
        x, outputs = self.decoder.step(self.embed(token), cache)
        return self.logits(x), append(cache, outputs)

    def decode_tree(
        self,
        tokens: Int[Array, "#B T"],
        depths: Int[Array, "#B T"],
        ends: Int[Array, "#B T"],
        cache: dict[str, Any],
    ) -> Float[Array, "B T D"]:
        """Final hidden states of many continuations of a prompt, given as one tree.

        Continuations that begin alike share tokens; the tree's T tokens are in depth-first order.
        Each token sees the prompt, the start id, its ancestors (`tree_mask(ends)`) and itself.
        `depths` is 1 for a token that follows the start id; `ends[b, t]` is the index just after
        the last descendant of token t. `cache` comes from `prefill`, before any further
        `decode_step`, and is only read. `logits` takes the result.
        """
        shape = (cache["prefix_mask"].shape[0], tokens.shape[1], self.config.width)
        x = constrain(jnp.broadcast_to(self.embed(tokens), shape))
        return self.decoder.tree(x, depths, ends, cache)
