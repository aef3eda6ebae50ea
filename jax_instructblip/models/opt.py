"""OPT, BLIP-2's decoder: one causal row of [visual prompt ; text].

Layer norms before each part and a last one, learned positions, ReLU, biases everywhere, and a head
that is the token embedding itself.
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
from jax_instructblip.models.dense import word_logits
from jax_instructblip.models.layers import (
    RESIDUAL,
    Dropout,
    LayerNorm,
    Mlp,
    Network,
    Scan,
    constrain,
    scan_layers,
    take_slots,
    unique_inverse,
    zip_layers,
)
from jax_instructblip.models.masks import causal_mask, padding_mask, tree_mask
from jax_instructblip.models.variants import OptConfig

OFFSET = 2  # position p is row p + 2 of the table: the first two rows were fairseq's padding


class OptLayer(nn.Module):
    """One layer; each method returns what a scan carries and what it stacks."""

    config: OptConfig
    dtype: Any

    def setup(self):
        c, biases = self.config, ("query", "key", "value", "out")
        self.attention_norm = LayerNorm(c.norm_eps)
        self.attention = Attention(c.width, c.heads, c.head_width, self.dtype, biases)
        self.mlp_norm = LayerNorm(c.norm_eps)
        self.mlp = Mlp(c.width, c.mlp, self.dtype, "relu")
        self.drop = Dropout(c.dropout)

    def __call__(self, x, _, mask, return_kv, train):
        """Runs whole rows; with `return_kv` keys and values come back as a cache has them."""
        dropout = functools.partial(self.drop, deterministic=not train)
        y, attention = self.attention_norm(x), self.attention
        key, value = attention.key(y), attention.value(y)
        mixed = attend(attention.query(y), key, value, mask)
        x = constrain(x + dropout(attention.out(mixed)))
        x = constrain(x + dropout(self.mlp(self.mlp_norm(x))))
        return x, ({"key": heads_first(key), "value": heads_first(value)} if return_kv else None)

    def step(self, x, cache, prefix_mask, view):
        """Runs one token `[B, R, D]`; what `attend_tail` returns comes back, for `append`."""
        y, attention = self.attention_norm(x), self.attention
        token = {"key": heads_first(attention.key(y)), "value": heads_first(attention.value(y))}
        past, current, output = attend_tail(cache["tail"], token, view)
        cached = [CachedKV(**cache["prefix"], mask=prefix_mask), past]
        x = constrain(x + attention.out(attend_cached(attention.query(y), cached, current)))
        return constrain(x + self.mlp(self.mlp_norm(x))), output

    def tree(self, x, prefix, prefix_mask, mask):
        """Runs a tree of tokens `[B, T, D]` behind the prompt; nothing is stored."""
        y, attention = self.attention_norm(x), self.attention
        key, value = heads_first(attention.key(y)), heads_first(attention.value(y))
        cached = [CachedKV(**prefix, mask=prefix_mask), CachedKV(key, value, mask)]
        x = constrain(x + attention.out(attend_cached(attention.query(y), cached)))
        return constrain(x + self.mlp(self.mlp_norm(x))), None


class Opt(Network):
    """The whole language model; same methods as `llama.Llama`."""

    config: OptConfig
    dtype: Any
    scan: Scan = Scan()

    def setup(self):
        c = self.config
        table = functools.partial(
            nn.Embed,
            features=c.width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=RESIDUAL,
        )
        self.embedding = table(c.vocab, name="embed")
        self.position_embedding = table(c.max_positions + OFFSET, name="position_embed")
        layers = scan_layers(OptLayer, c.layers, self.scan, call=3, step=2, tree=2)
        self.layers = layers(c, self.dtype)
        self.norm = LayerNorm(c.norm_eps)

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Token embeddings without positions, which `at` adds."""
        return constrain(self.embedding(tokens))

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of normed hidden states: products with the token embedding."""
        return word_logits(x, self.embedding.embedding, "VD", self.dtype)

    def at(self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]) -> Float[Array, "B T D"]:
        """Embedded slots at their positions, the beginning of a residual stream."""
        # Padding may stand beyond the table. A row of NaN there would reach every slot: attention
        # multiplies what it masks by 0.
        places = jnp.minimum(positions, self.config.max_positions - 1) + OFFSET
        return constrain(x.astype(RESIDUAL) + self.position_embedding(places))

    def hidden(
        self, inputs: Array, segments: Array, positions: Array, return_kv: bool, train: bool
    ) -> tuple[Array, Any]:
        """Normed hidden states `[B, X, D]`; keys and values of all layers where `return_kv`."""
        x = self.at(inputs, positions)
        x, cache = self.layers(x, None, causal_mask(segments), return_kv, train)
        return self.norm(x), cache

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
        return self.logits(take_slots(x, asked, unique_inverse(asked, x.shape[1])))

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
        return self.logits(x), start(prefix, valid, tail_length)

    def decode_step(
        self, token: Int[Array, "B R"], cache: dict[str, Any]
    ) -> tuple[Float[Array, "B R V"], dict[str, Any]]:
        """Logits of the token after `token`, and the cache with `token` written to its tail."""
        valid = cache["prefix_mask"]
        positions = jnp.broadcast_to(valid.sum(axis=1, keepdims=True) + cache["step"], token.shape)
        x, outputs = self.layers.step(
            self.at(self.embed(token), positions),
            zip_layers(prefix=cache["prefix"], tail=cache["tail"]),
            padding_mask(valid),
            tail_view(cache),
        )
        return self.logits(self.norm(x)), append(cache, outputs)

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
        x = constrain(jnp.broadcast_to(self.embed(tokens), shape))
        x, _ = self.layers.tree(
            self.at(x, valid.sum(axis=1, keepdims=True) + depths - 1),
            cache["prefix"],
            padding_mask(valid),
            tree_mask(ends),
        )
        return self.norm(x)
