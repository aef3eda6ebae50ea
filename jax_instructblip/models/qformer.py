"""Q-Former: learned queries read the instruction and the image for the language model.

BERT-base with three additions: the queries, cross-attention to the image in even layers (by the
queries alone), and a feed-forward of their own for the queries. Everything that InstructBLIP trains
is here, including the image norm before the Q-Former and the projection after it.

    method       input                                              used for
    read_image   queries, with cross-attention to the image         ITC, BLIP-2's second stage
    read_text    text                                               ITC
    read_both    [queries ; text], with cross-attention             ITM, InstructBLIP
    write_text   text, causal, after the queries' keys and values   ITG
    decode_step  one token of such a text, with a cache             generated captions

ITC, ITM and ITG are BLIP-2's losses: image-text contrast, matching, and captioning.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.attention import (
    Attention,
    CachedKV,
    attend,
    attend_cached,
    heads_first,
)
from jax_instructblip.models.cache import Cache, append, attend_tail, start, tail_view
from jax_instructblip.models.dense import Dense
from jax_instructblip.models.layers import (
    RESIDUAL,
    Dropout,
    Embedding,
    LayerNorm,
    Mlp,
    Network,
    Scan,
    constrain,
    scan_layers,
    zip_layers,
)
from jax_instructblip.models.masks import padding_mask, prefix_causal_mask
from jax_instructblip.models.variants import QFormerConfig

BIASES = ("query", "key", "value", "out")
PAIR = ("cross", "plain")  # the layers of a `QFormerPair`, in order

KeyValue = dict[str, Array]  # key and value [B, S, N, K] of a layer
# Patches of two images per sample: the sample's last row sees the second, its others the first.
TwoImages = tuple[Float[Array, "G P Dv"], Float[Array, "G P Dv"]]


class QFormerLayer(nn.Module):
    """One post-norm layer over `[queries ; text]`; with `cross` the queries also see the image."""

    config: QFormerConfig
    dtype: Any
    cross: bool

    def setup(self):
        c = self.config
        self.drop = Dropout(c.dropout)
        norm = functools.partial(LayerNorm, c.norm_eps)
        mlp = functools.partial(Mlp, c.width, c.mlp, self.dtype)
        attention = functools.partial(
            Attention, c.width, c.heads, c.width // c.heads, self.dtype, BIASES
        )
        self.attention, self.attention_norm = attention(), norm()
        if self.cross:
            self.cross_attention, self.cross_attention_norm = attention(), norm()
        self.query_mlp, self.query_mlp_norm = mlp(), norm()
        self.text_mlp, self.text_mlp_norm = mlp(), norm()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        past: KeyValue | None,
        mask: Bool[Array, "#B 1 #T S"] | None,
        image: Float[Array, "G P Dv"] | KeyValue | TwoImages | None,
        queries: int,
        train: bool,
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """The layer's output, and the keys and values of `x` in its self-attention.

        The first `queries` positions of `x` are queries, the others text; either may be absent.
        Keys and values in `past` are put before those of `x`; `mask` covers both. `image` is as in
        `see`, or None where no image is seen.
        """
        dropout = functools.partial(self.drop, deterministic=not train)
        attention = self.attention
        own = {"key": attention.key(x), "value": attention.value(x)}
        seen = own
        if past is not None:
            seen = {name: jnp.concatenate([past[name], own[name]], axis=1) for name in own}
        mixed = attend(attention.query(x), seen["key"], seen["value"], mask, dropout=dropout)
        x = self.attention_norm(constrain(x + dropout(attention.out(mixed))))
        first, text = x[:, :queries], x[:, queries:]
        if image is not None and self.cross:
            y = self.see(first, image, dropout)
            first = self.cross_attention_norm(constrain(first + dropout(y)))
        if queries:
            y = self.query_mlp(first)
            first = self.query_mlp_norm(constrain(first + dropout(y)))
        if text.shape[1]:
            y = self.text_mlp(text)
            text = self.text_mlp_norm(constrain(text + dropout(y)))
        return constrain(jnp.concatenate([first, text], axis=1)), own

    def see(
        self,
        x: Float[Array, "B Q D"],
        image: Float[Array, "G P Dv"] | KeyValue | TwoImages,
        dropout: Any,
    ) -> Float[Array, "B Q D"]:
        """Output of the cross-attention of the queries `x` to the images.

        `image` holds patches, the result of `image_kv`, or two images per sample (`TwoImages`: the
        sample's last row sees the second, its others the first). There may be several rows of `x`
        per image. Rows about one image are adjacent, so that its keys and values, which are
        computed once, serve all of them. `dropout` is a function that is applied to the attention
        weights.
        """
        if isinstance(image, tuple):
            rows = x.reshape(image[0].shape[0], -1, *x.shape[1:])  # [G, k, Q, D]
            parts = rows[:, :-1], rows[:, -1:]
            seen = [
                self.see(part.reshape(-1, *x.shape[1:]), each, dropout).reshape(part.shape)
                for part, each in zip(parts, image, strict=True)
            ]
            return jnp.concatenate(seen, axis=1).reshape(x.shape)
        kv = image if isinstance(image, dict) else self.image_kv(image)
        rows = x.reshape(kv["key"].shape[0], -1, x.shape[-1])
        query = self.cross_attention.query(rows)
        y = self.cross_attention.out(attend(query, kv["key"], kv["value"], dropout=dropout))
        return y.reshape(x.shape)

    def image_kv(self, image: Float[Array, "G P Dv"]) -> KeyValue:
        """Keys and values [G, P, N, K] of patches for the cross-attention, if `cross`."""
        attention = self.cross_attention
        return {"key": attention.key(image), "value": attention.value(image)}

    def step(
        self, x: Float[Array, "B R D"], cache: Any, prefix_mask: Bool[Array, "B 1 1 S"], view: Any
    ) -> tuple[Float[Array, "B R D"], Any]:
        """Output of one text token per row, and its key and value for `cache.append`.

        `cache` is {"prefix": ..., "tail": ...}, this layer's part of each (`cache.py`), `view` the
        `cache.TailView` of the step. `prefix_mask` is False on padding of the prefix.
        """
        attention = self.attention
        own = {"key": heads_first(attention.key(x)), "value": heads_first(attention.value(x))}
        past, current, output = attend_tail(cache["tail"], own, view)
        cached = [CachedKV(**cache["prefix"], mask=prefix_mask), past]
        mixed = attend_cached(attention.query(x), cached, current)
        x = self.attention_norm(constrain(x + attention.out(mixed)))
        return self.text_mlp_norm(constrain(x + self.text_mlp(x))), output


class QFormerPair(nn.Module):
    """Two layers, of which the first cross-attends to the image; the unit that is scanned."""

    config: QFormerConfig
    dtype: Any

    def setup(self):
        self.cross = QFormerLayer(self.config, self.dtype, cross=True)
        self.plain = QFormerLayer(self.config, self.dtype, cross=False)

    def __call__(self, x, past, mask, image, queries, return_kv, train):
        """Runs both layers on `x` [B, T, D]; returns their output, and their keys and values.

        The second result is None unless `return_kv`. It maps a layer's name (`PAIR`) to the keys
        and values of its self-attention, as `past` (or None) does. `past["image"]` may hold the
        result of `cross_kv` instead of `image`. Other arguments are those of a `QFormerLayer`.
        """
        past, kept = past or {}, {}
        image = past.get("image", image)
        for name in PAIR:
            x, kept[name] = getattr(self, name)(x, past.get(name), mask, image, queries, train)
        return x, kept if return_kv else None

    def cross_kv(self, carry, _, image):
        """Returns (carry unchanged, keys and values [G, P, N, K] of patches `image` [G, P, Dv])."""
        return carry, self.cross.image_kv(image)

    def step(self, x, cache, prefix_mask, view):
        """Runs both layers on one text token per row, `x` [B, R, D]; returns (x, new entries).

        `cache` maps `prefix` and `tail` to the keys and values of both layers by name, `view` is
        the `cache.TailView` of the step, `prefix_mask` [B, 1, 1, S] is False on padding. The new
        entries are for `cache.append`.
        """
        kept = {}
        for name in PAIR:
            own = {part: cache[part][name] for part in cache}
            x, kept[name] = getattr(self, name).step(x, own, prefix_mask, view)
        return x, kept


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
            embed = functools.partial(Embedding, features=c.width, embedding_init=normal)
            self.text_embed, self.position_embed = embed(c.vocab), embed(c.max_positions)
        self.embed_norm = LayerNorm(c.norm_eps)
        self.drop = Dropout(c.dropout)
        layers = scan_layers(QFormerPair, c.layers // 2, self.scan, call=5, step=2, cross_kv=1)
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
        """Outputs of the queries, which see the image but no text, and their keys and values.

        The second item is for `write_text`; it is None unless `return_kv`.
        """
        image = self.image_norm(patches)
        return self._run(self._queries(image.shape[0]), None, None, image, return_kv, train)

    def image_kv(self, patches: Float[Array, "G P Dv"]) -> KeyValue:
        """Keys and values [Y, G, P, N, K] of patches in each of the Y layers with cross-attention.

        `read_both` takes them in place of the patches, for any number of texts.
        """
        image = self.image_norm(patches)
        return self.layers.cross_kv(jnp.zeros((), self.dtype), None, image)[1]

    def read_text(
        self, tokens: Int[Array, "B L"], valid: Bool[Array, "B L"], train: bool = False
    ) -> Float[Array, "B L D"]:
        """Text outputs without an image, bidirectional; `valid` is False on padding."""
        return self._run(self.embed_text(tokens), None, padding_mask(valid), None, False, train)[0]

    def read_both(
        self,
        patches: Float[Array, "G P Dv"] | KeyValue | TwoImages,
        tokens: Int[Array, "B L"],
        valid: Bool[Array, "B L"],
        train: bool = False,
    ) -> Float[Array, "B Q D"]:
        """Outputs of the queries, which see the image and the text; the text sees them, too.

        There may be k texts per image, B = G x k: the first k texts belong to image 0, and so on.
        Instead of patches the result of `image_kv` can be given, or two images per sample: the last
        of its k texts belongs to the second, the others to the first (`TwoImages`).
        Queries have no position embedding, text positions start at 0, and one layer norm covers
        both.
        """
        past, image = None, None
        if isinstance(patches, dict):
            past = {"image": patches}
        else:
            image = jax.tree.map(self.image_norm, patches)
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
        """Text outputs for generation: a token sees the queries and the tokens up to itself.

        `kv` is the second item that `read_image` returns with `return_kv`; the queries do not see
        the text.
        """
        mask = prefix_causal_mask(valid, self.config.queries)
        return self._run(self.embed_text(tokens), kv, mask, None, False, train)[0]

    def prefill(self, patches: Float[Array, "B P Dv"], tail_length: int) -> Cache:
        """The cache (`cache.py`) of each image's queries, with space for `tail_length` tokens."""
        _, kv = self.read_image(patches, return_kv=True)
        prefix = jax.tree.map(lambda leaf: leaf.swapaxes(-3, -2), kv)  # heads first
        valid = jnp.ones((patches.shape[0], self.config.queries), bool)
        return start(prefix, valid, tail_length)

    def decode_step(
        self, token: Int[Array, "B R"], cache: Cache
    ) -> tuple[Float[Array, "B R D"], Cache]:
        """Output of the text token that each row continues with, and the cache one token longer."""
        x = self.text_embed(token) + self.position_embed(cache["step"][None, None])
        x, outputs = self.layers.step(
            self.embed_norm(constrain(x)),
            zip_layers(prefix=cache["prefix"], tail=cache["tail"]),
            padding_mask(cache["prefix_mask"]),
            tail_view(cache),
        )
        return x, append(cache, outputs)

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
        self, x: Array, past: Any, mask: Array | None, image: Any, *flags: bool
    ) -> tuple[Array, Any]:
        """Applies layer norm, dropout and all layers; `flags` are `return_kv` and `train`.

        Returns the outputs and, with `return_kv`, the keys and values of every layer, else None.
        """
        sees = image is not None or "image" in (past or {})
        queries = self.config.queries if sees else 0
        x = self.drop(self.embed_norm(x), deterministic=not flags[-1])
        return self.layers(x, past, mask, image, queries, *flags)
