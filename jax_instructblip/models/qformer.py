"""Q-Former: queries read the instruction, look at the image, and speak to the language model.

BERT-base with three additions: cross-attention in even layers (for the queries alone), a
feed-forward of their own for the queries, and the queries themselves. Everything that InstructBLIP
trains is here, the image norm before it and the projection after it included.

    read_image   queries | image          what the image says          unimodal: ITC, stage 2
    read_text    text                     what the text says           unimodal: ITC
    read_both    [queries ; text] | image  both, in both directions    ITM, InstructBLIP
    write_text   text behind the queries  causal                       ITG
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.attention import Attention, attend
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
from jax_instructblip.models.masks import padding_mask, prefix_causal_mask
from jax_instructblip.models.variants import QFormerConfig

BIASES = ("query", "key", "value", "out")

KeyValue = dict[str, Array]  # key and value [B, S, N, K] of a layer


class QFormerLayer(nn.Module):
    """One post-norm layer over `[queries ; text]`; with `cross` the queries look at the image."""

    config: QFormerConfig
    dtype: Any
    cross: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        past: KeyValue | None,
        mask: Bool[Array, "#B 1 #T S"] | None,
        image: Float[Array, "G P Dv"] | None,
        image_kv: KeyValue | None,
        queries: int,
        train: bool,
    ) -> tuple[Float[Array, "B T D"], KeyValue, KeyValue | None]:
        """The layer's output, the keys and values of `x`, and those of the image it looked at.

        `x` are `queries` queries, then text; one of the two may be absent. What `past` holds is
        seen ahead of `x`. `image_kv` stands for the image where its keys were computed before.
        """
        c = self.config
        layer = Dropout(c.dropout)
        dropout = functools.partial(layer, deterministic=not train)
        norm = functools.partial(LayerNorm, c.norm_eps)
        mlp = functools.partial(Mlp, c.width, c.mlp, self.dtype)
        make_attention = functools.partial(
            Attention, c.width, c.heads, c.width // c.heads, self.dtype, BIASES
        )

        attention = make_attention(name="attention")
        own = {"key": attention.key(x), "value": attention.value(x)}
        seen = own
        if past is not None:
            seen = {name: jnp.concatenate([past[name], own[name]], axis=1) for name in own}
        mixed = attend(attention.query(x), seen["key"], seen["value"], mask, dropout=dropout)
        x = norm(name="attention_norm")(constrain(x + dropout(attention.out(mixed))))
        first, text = x[:, :queries], x[:, queries:]
        if self.cross and (image is not None or image_kv is not None):
            cross = make_attention(name="cross_attention")
            if image is not None:
                image_kv = {"key": cross.key(image), "value": cross.value(image)}
            assert image_kv is not None
            key, value = image_kv["key"], image_kv["value"]
            # Rows that share an image lie beside each other: its keys are made once for all.
            rows = first.reshape(key.shape[0], -1, first.shape[-1])
            y = cross.out(attend(cross.query(rows), key, value, dropout=dropout))
            y = y.reshape(first.shape)
            first = norm(name="cross_attention_norm")(constrain(first + dropout(y)))
        if queries:
            y = mlp(name="query_mlp")(first)
            first = norm(name="query_mlp_norm")(constrain(first + dropout(y)))
        if text.shape[1]:
            y = mlp(name="text_mlp")(text)
            text = norm(name="text_mlp_norm")(constrain(text + dropout(y)))
        return constrain(jnp.concatenate([first, text], axis=1)), own, image_kv


class QFormerPair(nn.Module):
    """An even layer, with cross-attention, and the odd one after it: what the scan repeats."""

    config: QFormerConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, past, mask, image, queries, return_kv, train):
        """Runs both layers; returns the keys and values that `return_kv` names.

        "queries" (or True) are those of `x` in each layer by name, which `past` takes; "image"
        those of the patches, which `past` takes under that name.
        """
        past, kept, image_kv = past or {}, {}, None
        for name in ("cross", "plain"):
            cross = name == "cross"
            layer = QFormerLayer(self.config, self.dtype, cross=cross, name=name)
            shown = past.get("image") if cross else None
            x, kept[name], shown = layer(
                x, past.get(name), mask, image if cross else None, shown, queries, train
            )
            image_kv = shown if cross else image_kv
        if return_kv == "image":
            return x, image_kv
        return x, kept if return_kv else None


class QFormer(Network):
    """Patch features and text to queries that speak of the image.

    As a bridge (`__call__`) it projects them to the language model's width. The first stage of
    BLIP-2 reads image and text apart (`read_image`, `read_text`), together (`read_both`), and lets
    the text be written after the queries (`write_text`).
    """

    config: QFormerConfig
    dtype: Any
    scan: Scan = Scan()

    def setup(self):
        c = self.config
        self.image_norm = LayerNorm(c.image_norm_eps)
        normal = nn.initializers.normal(0.02)
        self.queries = self.param("queries", normal, (1, c.queries, c.width))
        if c.instruction_aware:
            embed = functools.partial(
                nn.Embed, features=c.width, embedding_init=normal, dtype=RESIDUAL
            )
            self.text_embed, self.position_embed = embed(c.vocab), embed(c.max_positions)
        self.embed_norm = LayerNorm(c.norm_eps)
        self.drop = Dropout(c.dropout)
        layers = scan_layers(QFormerPair, c.layers // 2, self.scan, call=5)
        self.layers = layers(c, self.dtype)
        if c.llm_width:
            self.projection = Dense((c.llm_width,), self.dtype)

    def __call__(
        self,
        patches: Float[Array, "B P Dv"],
        tokens: Int[Array, "B L"] | None = None,
        valid: Bool[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B Q Dl"]:
        """The Q query outputs, projected to the language model's width.

        `tokens` are the instruction in BERT ids, `valid` is False on padding; both are left out
        (and ignored) where the Q-Former is not instruction-aware.
        """
        if not self.config.instruction_aware:
            return self.projection(self.read_image(patches, train)[0])
        if tokens is None or valid is None:
            raise ValueError(
                "this Q-Former reads the instruction: the batch lacks qformer_tokens or "
                "qformer_mask"
            )
        return self.projection(self.read_both(patches, tokens, valid, train))

    def read_image(
        self, patches: Float[Array, "B P Dv"], train: bool = False, return_kv: bool = False
    ) -> tuple[Float[Array, "B Q D"], Any]:
        """The outputs of the queries that saw the image and no text.

        With `return_kv` their keys and values in every layer come back, for `write_text`.
        """
        image = self.image_norm(patches)
        return self._run(self._queries(image.shape[0]), None, None, image, return_kv, train)

    def image_kv(self, patches: Float[Array, "G P Dv"]) -> KeyValue:
        """Keys and values [Y, G, P, N, K] of the patches, in each of the Y layers that look.

        `read_both` takes them in place of the patches, for any number of texts.
        """
        image = self.image_norm(patches)
        return self._run(self._queries(image.shape[0]), None, None, image, "image", False)[1]

    def read_text(
        self, tokens: Int[Array, "B L"], valid: Bool[Array, "B L"], train: bool = False
    ) -> Float[Array, "B L D"]:
        """The outputs of the text alone, read in both directions."""
        return self._run(self.embed_text(tokens), None, padding_mask(valid), None, False, train)[0]

    def read_both(
        self,
        patches: Float[Array, "G P Dv"] | KeyValue,
        tokens: Int[Array, "B L"],
        valid: Bool[Array, "B L"],
        train: bool = False,
    ) -> Float[Array, "B Q D"]:
        """The outputs of the queries that saw the image and the text, which saw them.

        Each image may serve several texts in a row, B = G x k; its `image_kv` may stand for its
        patches. Queries carry no position, text positions start at 0, and one norm covers both.
        """
        image, past = None, None
        if isinstance(patches, dict):
            past = {"image": patches}
        else:
            image = self.image_norm(patches)
        queries = self._queries(tokens.shape[0])
        x = jnp.concatenate([queries, self.embed_text(tokens)], axis=1)
        ones = jnp.ones(queries.shape[:2], bool)
        mask = padding_mask(jnp.concatenate([ones, valid], axis=1))
        return self._run(x, past, mask, image, False, train)[0][:, : self.config.queries]

    def write_text(
        self,
        tokens: Int[Array, "B L"],
        valid: Bool[Array, "B L"],
        kv: Any,
        train: bool = False,
    ) -> Float[Array, "B L D"]:
        """The outputs of a text that is written: each token sees the queries and what precedes it.

        `kv` is what `read_image` gave back; the queries do not see the text.
        """
        mask = prefix_causal_mask(valid, self.config.queries)
        return self._run(self.embed_text(tokens), kv, mask, None, False, train)[0]

    def embed_text(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Word plus position embeddings `[B, L, D]`, before the norm."""
        c = self.config
        if tokens.shape[1] > c.max_positions:
            raise ValueError(
                f"the instruction has {tokens.shape[1]} tokens, the Q-Former has "
                f"{c.max_positions} positions: truncate it (data/text.py does, at 128)"
            )
        positions = self.position_embed(jnp.arange(tokens.shape[1]))
        return constrain(self.text_embed(tokens) + positions[None])

    def word_table(self) -> Float[Array, "V D"]:
        """The word embeddings, which the head of captions shares."""
        return self.text_embed.embedding

    def _queries(self, rows: int) -> Float[Array, "B Q D"]:
        shape = (rows, *self.queries.shape[1:])
        return jnp.broadcast_to(self.queries, shape).astype(RESIDUAL)

    def _run(
        self, x: Array, past: Any, mask: Array | None, image: Array | None, *flags: bool | str
    ) -> tuple[Array, Any]:
        """Norm, dropout and all layers; `flags` are `return_kv` and `train`."""
        looks = image is not None or "image" in (past or {})
        queries = self.config.queries if looks else 0
        x = self.drop(self.embed_norm(x), deterministic=not flags[-1])
        return self.layers(x, past, mask, image, queries, *flags)
