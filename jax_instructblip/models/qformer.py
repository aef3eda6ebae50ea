"""Q-Former: queries read the instruction, look at the image, and speak to the language model.

BERT-base with three additions: cross-attention in even layers (for the queries alone), a
feed-forward of their own for the queries, and the queries themselves. Everything that InstructBLIP
trains is here, the image norm before it and the projection after it included.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.attention import Attention
from jax_instructblip.models.dense import Dense
from jax_instructblip.models.layers import (
    RESIDUAL,
    Dropout,
    LayerNorm,
    Mlp,
    Network,
    Scan,
    constrain,
    scan_layers,
)
from jax_instructblip.models.masks import padding_mask
from jax_instructblip.models.variants import QFormerConfig

BIASES = ("query", "key", "value", "out")


class QFormerLayer(nn.Module):
    """One post-norm layer over `[queries ; text]`; `cross` adds the look at the image."""

    config: QFormerConfig
    dtype: Any
    cross: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B 1 1 T"] | None,
        image: Float[Array, "B P Dv"],
        train: bool,
    ) -> Float[Array, "B T D"]:
        c = self.config
        layer = Dropout(c.dropout)
        dropout = functools.partial(layer, deterministic=not train)
        norm = functools.partial(LayerNorm, c.norm_eps)
        mlp = functools.partial(Mlp, c.width, c.mlp, self.dtype)
        attention = functools.partial(
            Attention, c.width, c.heads, c.width // c.heads, self.dtype, BIASES
        )

        y = attention(name="attention")(x, x, mask, dropout=dropout)
        x = norm(name="attention_norm")(constrain(x + dropout(y)))
        queries, text = x[:, : c.queries], x[:, c.queries :]
        if self.cross:
            y = attention(name="cross_attention")(queries, image, dropout=dropout)
            queries = norm(name="cross_attention_norm")(constrain(queries + dropout(y)))
        y = mlp(name="query_mlp")(queries)
        queries = norm(name="query_mlp_norm")(constrain(queries + dropout(y)))
        if c.instruction_aware:
            y = mlp(name="text_mlp")(text)
            text = norm(name="text_mlp_norm")(constrain(text + dropout(y)))
        return constrain(jnp.concatenate([queries, text], axis=1))


class QFormerPair(nn.Module):
    """An even layer, with cross-attention, and the odd one after it: what the scan repeats."""

    config: QFormerConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, _, mask, image, train):
        x = QFormerLayer(self.config, self.dtype, cross=True, name="cross")(x, mask, image, train)
        x = QFormerLayer(self.config, self.dtype, cross=False, name="plain")(x, mask, image, train)
        return x, None


class QFormer(Network):
    """Patch features and instruction to the visual prompt of the language model."""

    config: QFormerConfig
    dtype: Any
    scan: Scan = Scan()

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "B P Dv"],
        tokens: Int[Array, "B L"] | None = None,
        valid: Bool[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B Q Dl"]:
        """The Q query outputs, projected to the language model's width.

        `tokens` are the instruction in BERT ids, `valid` is False on padding; both are left out
        (and ignored) where the Q-Former is not instruction-aware. Queries carry no position, text
        positions start at 0, and one norm covers both.
        """
        c = self.config
        image = LayerNorm(c.image_norm_eps, name="image_norm")(patches)
        queries = self.param("queries", nn.initializers.normal(0.02), (1, c.queries, c.width))
        x = jnp.broadcast_to(queries, (image.shape[0], *queries.shape[1:])).astype(RESIDUAL)
        mask = None
        if c.instruction_aware:
            if tokens is None or valid is None:
                raise ValueError(
                    "this Q-Former reads the instruction: the batch lacks qformer_tokens or "
                    "qformer_mask"
                )
            if tokens.shape[1] > c.max_positions:
                raise ValueError(
                    f"the instruction has {tokens.shape[1]} tokens, the Q-Former has "
                    f"{c.max_positions} positions: truncate it (data/text.py does, at 128)"
                )
            x = jnp.concatenate([x, self.embed_text(tokens)], axis=1)
            queries = jnp.ones((x.shape[0], c.queries), bool)
            mask = padding_mask(jnp.concatenate([queries, valid], axis=1))
        x = LayerNorm(c.norm_eps, name="embed_norm")(x)
        x = Dropout(c.dropout)(x, deterministic=not train)
        pairs = scan_layers(QFormerPair, c.layers // 2, self.scan, call=3)
        x, _ = pairs(c, self.dtype, name="layers")(x, None, mask, image, train)
        return Dense((c.llm_width,), self.dtype, name="projection")(x[:, : c.queries])

    def embed_text(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Word plus position embeddings `[B, L, D]`, before the norm."""
        c = self.config
        table = nn.initializers.normal(0.02)
        words = nn.Embed(c.vocab, c.width, embedding_init=table, dtype=RESIDUAL, name="text_embed")
        positions = nn.Embed(
            c.max_positions, c.width, embedding_init=table, dtype=RESIDUAL, name="position_embed"
        )
        return constrain(words(tokens) + positions(jnp.arange(tokens.shape[1]))[None])
