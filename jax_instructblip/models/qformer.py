"""Q-Former: learned queries read the instruction and the image for the language model.

BERT-base with three additions: the queries, cross-attention to the image in even layers (by the
queries alone), and a feed-forward of their own for the queries. Everything that InstructBLIP trains
is here, including the image norm before the Q-Former and the projection after it.

    method       input                                              used for
    read_image   queries, with cross-attention to the image         ITC, BLIP-2's second stage
    read_text    text                                               ITC
    read_both    [queries ; text], with cross-attention             ITM, InstructBLIP
    write_text   text, causal, after the queries' keys and values   ITG

ITC, ITM and ITG are BLIP-2's losses: image-text contrast, matching, and captioning.
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
    """One post-norm layer over `[queries ; text]`; with `cross` the queries also see the image."""

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

        The first `queries` positions of `x` are queries, the others text; either may be absent. The
        keys and values in `past` come before those of `x`. `image_kv` replaces `image` if its keys
        and values have been computed before.
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
            # Texts about one image are adjacent rows, so its keys and values are computed once.
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
    """An even layer, with cross-attention, and the odd layer after it: the unit that is scanned."""

    config: QFormerConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, past, mask, image, queries, return_kv, train):
        """Returns the output of both layers, and the keys and values that `return_kv` asks for.

        With True these are the keys and values of `x` by layer, a dict with the keys "cross" and
        "plain", as `past` takes them; with "image" those of the patches, which `past` takes under
        the key "image"; otherwise None.
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
    """Maps the patch features of an image, and a text if given, to Q vectors.

    As a bridge (`__call__`) it also projects the vectors to the language model's width. BLIP-2's
    first stage encodes image and text separately (`read_image`, `read_text`) or together
    (`read_both`), and generates a text after the queries (`write_text`).
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

        `tokens` is the instruction in BERT ids, `valid` is False on padding. A Q-Former that reads
        no instruction ignores both; the others raise a ValueError without them.
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
        """Query outputs that saw the image but no text, and the keys and values for `write_text`.

        The second item holds those of the queries in every layer; it is None unless `return_kv`.
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
        """Text outputs without an image; attention is bidirectional and hides padding."""
        return self._run(self.embed_text(tokens), None, padding_mask(valid), None, False, train)[0]

    def read_both(
        self,
        patches: Float[Array, "G P Dv"] | KeyValue,
        tokens: Int[Array, "B L"],
        valid: Bool[Array, "B L"],
        train: bool = False,
    ) -> Float[Array, "B Q D"]:
        """Query outputs after bidirectional attention over queries and text, and over the image.

        With B = G x k, each image serves k texts in a row; its `image_kv` can replace its patches.
        Queries have no position embedding, text positions start at 0, and one layer norm covers
        both.
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
        """Text outputs, with causal attention to the queries and the tokens up to itself.

        `kv` is the second item that `read_image` returns with `return_kv`; the queries do not see
        the text.
        """
        mask = prefix_causal_mask(valid, self.config.queries)
        return self._run(self.embed_text(tokens), kv, mask, None, False, train)[0]

    def embed_text(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Word plus position embeddings, before the norm; a ValueError for too many tokens."""
        c = self.config
        if tokens.shape[1] > c.max_positions:
            raise ValueError(
                f"the instruction has {tokens.shape[1]} tokens, the Q-Former has "
                f"{c.max_positions} positions: truncate it (data/text.py does, at 128)"
            )
        positions = self.position_embed(jnp.arange(tokens.shape[1]))
        return constrain(self.text_embed(tokens) + positions[None])

    def word_table(self) -> Float[Array, "V D"]:
        """The matrix of word embeddings, which the caption head shares."""
        return self.text_embed.embedding

    def _queries(self, rows: int) -> Float[Array, "B Q D"]:
        shape = (rows, *self.queries.shape[1:])
        return jnp.broadcast_to(self.queries, shape).astype(RESIDUAL)

    def _run(
        self, x: Array, past: Any, mask: Array | None, image: Array | None, *flags: bool | str
    ) -> tuple[Array, Any]:
        """Applies layer norm, dropout and all layers; `flags` are `return_kv` and `train`.

        Returns the outputs and, with `return_kv`, keys and values of every layer, else None.
        """
        looks = image is not None or "image" in (past or {})
        queries = self.config.queries if looks else 0
        x = self.drop(self.embed_norm(x), deterministic=not flags[-1])
        return self.layers(x, past, mask, image, queries, *flags)
