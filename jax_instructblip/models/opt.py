"""OPT, the decoder-only language model of BLIP-2: one causal row of [visual vectors ; text].

Layer norms before each sub-layer and after the last layer, learned positions, ReLU, biases
everywhere, and the token embedding as head.
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
from jax_instructblip.models.dense import word_logits
from jax_instructblip.models.layers import (
    RESIDUAL,
    Dropout,
    Embedding,
    LayerNorm,
    Mlp,
    Scan,
    constrain,
    scan_layers,
)
from jax_instructblip.models.variants import OptConfig

OFFSET = 2  # position p is row p + 2 of the table: the first two rows were fairseq's padding


class OptLayer(nn.Module):
    """One layer of OPT; each method returns (carry, output), as `nn.scan` expects.

    The carry is the residual stream `x`, float32; the scanned argument `_` is None.
    `prefix_mask` `[B, 1, 1, S]` is False on padding of the cached prompt.
    """

    config: OptConfig
    dtype: Any
    fused: str = ""

    def setup(self):
        c, biases = self.config, ("query", "key", "value", "out")
        self.attention_norm = LayerNorm(c.norm_eps)
        self.attention = Attention(c.width, c.heads, c.head_width, self.dtype, biases)
        self.mlp_norm = LayerNorm(c.norm_eps)
        self.mlp = Mlp(c.width, c.mlp, self.dtype, "relu")
        self.drop = Dropout(c.dropout)

    def __call__(self, x, _, mask, return_kv, train):
        """Runs full sequences `x` [B, T, D]; returns (x, kv), where kv is None unless `return_kv`.

        `mask` is as in `attention.attend`. kv is {"key": ..., "value": ...}, each `[B, N, T, K]` as
        in a cache.
        """
        dropout = functools.partial(self.drop, deterministic=not train)
        y, attention = self.attention_norm(x), self.attention
        key, value = attention.key(y), attention.value(y)
        mixed = attend(attention.query(y), key, value, mask, fused=self.fused)
        x = constrain(x + dropout(attention.out(mixed)))
        x = constrain(x + dropout(self.mlp(self.mlp_norm(x))))
        return x, ({"key": heads_first(key), "value": heads_first(value)} if return_kv else None)

    def step(self, x, cache, prefix_mask, view):
        """Runs each beam's newest token, `x` [B, R, D]; returns (x, what `cache.append` takes).

        `cache` is {"prefix": ..., "tail": ...}, this layer's part of each (`cache.py`), `view` the
        `cache.TailView` of the step.
        """
        query, key, value = self.attention.newest(self.attention_norm(x), view.unstacked)
        token = {"key": heads_first(key), "value": heads_first(value)}
        past, current, output = attend_tail(cache["tail"], token, view)
        cached = [CachedKV(**cache["prefix"], mask=prefix_mask), past]
        x = constrain(x + self.attention.out(attend_cached(query, cached, current)))
        return constrain(x + self.mlp(self.mlp_norm(x))), output

    def tree(self, x, prefix, prefix_mask, mask):
        """Runs a tree of tokens `x` [B, T, D] after the cached prompt; returns (x, None).

        `prefix` is the prompt's {"key": ..., "value": ...}, each `[B, N, S, K]`; `mask` `[B, 1, T,
        T]` is the `masks.tree_mask` of the tokens.
        """
        query, key, value = self.attention.newest(self.attention_norm(x))
        own = CachedKV(heads_first(key), heads_first(value), mask)
        cached = [CachedKV(**prefix, mask=prefix_mask), own]
        x = constrain(x + self.attention.out(attend_cached(query, cached)))
        return constrain(x + self.mlp(self.mlp_norm(x))), None


class Opt(DecoderOnly):
    """The whole OPT model; most methods are in `DecoderOnly`."""

    config: OptConfig
    dtype: Any
    scan: Scan = Scan()

    def setup(self):
        c = self.config
        table = functools.partial(
            Embedding, features=c.width, embedding_init=nn.initializers.normal(0.02)
        )
        self.embedding = table(c.vocab, name="embed")
        self.position_embedding = table(c.max_positions + OFFSET, name="position_embed")
        layers = scan_layers(OptLayer, c.layers, self.scan, call=3, step=2, tree=2)
        self.layers = layers(c, self.dtype, self.scan.fused)
        self.norm = LayerNorm(c.norm_eps)

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Float32 token embeddings; `begin` adds the position embeddings."""
        return constrain(self.embedding(tokens))

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of normed hidden states: products with the token embedding."""
        return word_logits(x, self.embedding.embedding, "VD", self.dtype)

    def shared(self, positions: Int[Array, "#B T"]) -> tuple[Any, ...]:
        """An empty tuple: the positions are already added to the inputs of the layers."""
        return ()

    def begin(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        """The sum of the embedded slots and the embeddings of their positions, float32."""
        # Positions of padding may exceed the table. The lookup would then give NaN, and attention,
        # which multiplies masked values by 0, would spread it to every slot.
        places = jnp.minimum(positions, self.config.max_positions - 1) + OFFSET
        return constrain(x.astype(RESIDUAL) + self.position_embedding(places))
