"""BLIP-2's first stage: features of images and texts, image-text matching, captions.

    images  [B, H, W, 3]     captions  [B, L] BERT ids, `[CLS] ... [SEP]`
       --vision-->  patches [B, P, Dv]                  frozen, or trained in fine-tuning
       --Q-Former, image alone-->  query outputs --project, normalise-->  features [B, Q, E]
       --Q-Former, text alone-->   [CLS] output --project, normalise-->   features [B, E]
       --Q-Former, image and text-->  query outputs --mean of a two-way head-->  match [B, 2]
       --Q-Former, text after the keys and values of the queries-->  caption logits [B, L, V]

E is the width of the features by which images and texts are compared. There is no language model;
the Q-Former and the output heads (`Heads`) are trained.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.cache import Cache
from jax_instructblip.models.dense import Dense, rank_of
from jax_instructblip.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    Network,
    Scans,
    constrain,
)
from jax_instructblip.models.qformer import QFormer
from jax_instructblip.models.variants import QFormerConfig, Variant
from jax_instructblip.models.vision import VisionTransformer

TEMPERATURE = 0.07  # initial divisor of the similarities; learned, and not clamped
DEC = -1  # index of the vocabulary's last id, [DEC], which begins a caption to be generated


class CaptionHead(nn.Module):
    """BERT's output head for vocabulary logits; its last kernel holds the word embeddings."""

    config: QFormerConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], table: Float[Array, "V D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of `x`; `table` holds the Q-Former's word embeddings."""
        c = self.config
        bias = self.param("bias", nn.initializers.zeros, (c.vocab,))
        x = ACTIVATIONS["gelu"](Dense((c.width,), self.dtype, name="in")(x).astype(jnp.float32))
        x = LayerNorm(c.norm_eps, name="norm")(x)
        logits = jnp.einsum(
            "...D,VD->...V",
            x.astype(self.dtype),
            table.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits + rank_of(bias.astype(jnp.float32), logits)


class Heads(nn.Module):
    """The output heads: image and text projection, match, and optionally caption and temperature.

    The last two exist only with `config.caption_head`.
    """

    config: QFormerConfig
    dtype: Any

    def setup(self):
        c = self.config
        self.image_projection = Dense((c.feature_width,), self.dtype)
        self.text_projection = Dense((c.feature_width,), self.dtype)
        self.match = Dense((2,), self.dtype, wide=True)
        if c.caption_head:
            self.caption = CaptionHead(c, self.dtype)
            self.temp = self.param("temp", nn.initializers.constant(TEMPERATURE), ())


class CaptionVocabulary(NamedTuple):
    """The ids that the decoding loops need, by default BERT's; named as in `LanguageConfig`."""

    vocab: int = 30523  # number of ids
    bos_id: int = 30522  # [DEC], which begins a caption to be generated
    eos_id: int = 102  # [SEP]
    pad_id: int = 0
    kind: str = "caption"


class Blip2(Network):
    """The whole first-stage model; `variant` holds its sizes, `dtype` is the compute dtype.

    `scans` sets how layers run and changes no result. `vocabulary` is only needed to generate
    captions (`prefill`, `decode_step`).
    """

    variant: Variant
    dtype: Any = jnp.float32
    scans: Scans = Scans()
    vocabulary: CaptionVocabulary = CaptionVocabulary()

    def setup(self):
        v, c = self.variant, self.variant.qformer
        self.vision = VisionTransformer(v.vision, self.dtype, self.scans.vision)
        self.qformer = QFormer(c, self.dtype, self.scans.qformer)
        self.heads = Heads(c, self.dtype)

    def encode_image(self, images: Array) -> Float[Array, "B P Dv"]:
        """Patch features of `images` [B, H, W, 3]: uint8, or floats that are normalised already."""
        return self.vision(images)

    def image_features(
        self, patches: Float[Array, "B P Dv"], train: bool = False, return_kv: bool = False
    ) -> tuple[Float[Array, "B Q E"], Any]:
        """Normalised features of each query, and the queries' keys and values for `caption_logits`.

        The second item is None unless `return_kv`.
        """
        x, kv = self.qformer.read_image(patches, train, return_kv)
        return normalise(self.heads.image_projection(x)), kv

    def text_features(
        self, tokens: Int[Array, "B L"], valid: Bool[Array, "B L"], train: bool = False
    ) -> Float[Array, "B E"]:
        """Normalised features of each text, from its `[CLS]`; `valid` is False on padding."""
        x = self.qformer.read_text(tokens, valid, train)
        return normalise(self.heads.text_projection(x[:, 0]))

    def image_kv(self, patches: Float[Array, "G P Dv"]) -> Any:
        """Keys and values of the patches in all cross-attention layers, for `match_logits`.

        They have the form that `QFormer.image_kv` returns.
        """
        return self.qformer.image_kv(patches)

    def raw_features(self, patches: Float[Array, "B P Dv"]) -> Float[Array, "B Q D"]:
        """Outputs of the queries that saw the image alone, before any projection."""
        return self.qformer.read_image(patches)[0]

    def raw_text_features(
        self, tokens: Int[Array, "B L"], valid: Bool[Array, "B L"]
    ) -> Float[Array, "B D"]:
        """The output of each text's `[CLS]`, before any projection."""
        return self.qformer.read_text(tokens, valid)[:, 0]

    def pair_features(
        self, patches: Float[Array, "G P Dv"], tokens: Int[Array, "B L"], valid: Bool[Array, "B L"]
    ) -> Float[Array, "B Q D"]:
        """Outputs of the queries that saw an image and a text together, before any projection.

        There may be k texts per image, paired as in `match_logits`; `valid` is False on padding.
        """
        return self.qformer.read_both(patches, tokens, valid)

    def project_image(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        """Results of `raw_features` in the space that images and texts share, not normalised."""
        return self.heads.image_projection(x)

    def project_text(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        """Results of `raw_text_features` in the space that images share, not normalised."""
        return self.heads.text_projection(x)

    def match_logits(
        self,
        patches: Any,
        tokens: Int[Array, "B L"],
        valid: Bool[Array, "B L"],
        train: bool = False,
    ) -> Float[Array, "B 2"]:
        """Float32 logits of (no match, match) for image-text pairs; `valid` is False on padding.

        There may be k texts per image, B = G x k: the first k texts are paired with image 0, and so
        on. Instead of patches [G, P, Dv] the result of `image_kv` can be given, or a pair of such
        arrays: of every k texts the last is then paired with the second image, the others with the
        first.
        """
        x = self.qformer.read_both(patches, tokens, valid, train)
        return self.heads.match(x).astype(jnp.float32).mean(axis=1)

    def caption_logits(
        self,
        tokens: Int[Array, "B L"],
        valid: Bool[Array, "B L"],
        kv: Any,
        train: bool = False,
    ) -> Float[Array, "B L V"]:
        """Float32 logits of the token after each of `tokens`, which begin with `[DEC]`.

        `kv` is the second item that `image_features` returns with `return_kv`.
        """
        x = self.qformer.write_text(tokens, valid, kv, train)
        return self.heads.caption(x, self.qformer.word_table())

    def prefill(
        self, batch: dict[str, Array], tail_length: int
    ) -> tuple[Float[Array, "B 1 V"], Cache]:
        """Logits of the first token of each image's caption, and the cache of its queries.

        `batch` has `images` [B, 1, H, W, 3] and `tokens` [B, 1], the id `[DEC]`. The cache has
        space for `tail_length` new tokens.
        """
        patches = self.encode_image(batch["images"][:, 0])
        return self.decode_step(batch["tokens"], self.qformer.prefill(patches, 1 + tail_length))

    def decode_step(
        self, token: Int[Array, "B R"], cache: Cache
    ) -> tuple[Float[Array, "B R V"], Cache]:
        """Float32 logits of the token after `token`, and the cache with it added; R are beams."""
        x, cache = self.qformer.decode_step(token, cache)
        return self.heads.caption(x, self.qformer.word_table()), cache

    def temperature(self) -> Float[Array, ""]:
        """The learned temperature, which divides similarities; exists only with a caption head."""
        return self.heads.temp.astype(jnp.float32)

    def make_params(self) -> None:
        """Runs every part once on the smallest inputs, so that `init` makes all parameters."""
        size, ones = self.variant.vision.image_size, jnp.ones((1, 2), jnp.int32)
        patches = self.encode_image(jnp.zeros((1, size, size, 3), jnp.uint8))
        _, kv = self.image_features(patches, return_kv=True)
        self.text_features(ones, ones > 0)
        self.match_logits(patches, ones, ones > 0)
        if self.variant.qformer.caption_head:
            self.caption_logits(ones, ones > 0, kv)


def image_to_text(images: Float[Array, "B Q E"], texts: Float[Array, "C E"]) -> Float[Array, "B C"]:
    """Float32 similarity of each image and each text: the largest product over the image's queries.

    Row b stays on the device of image b; the text features go to every device.
    """
    products = jnp.einsum("BQE,CE->BQC", images, texts, preferred_element_type=jnp.float32)
    return constrain(products.max(axis=1))


def text_to_image(texts: Float[Array, "C E"], images: Float[Array, "B Q E"]) -> Float[Array, "C B"]:
    """Float32 similarity of each text and each image, as `image_to_text` transposed.

    Row c stays on the device of text c; the image features go to every device.
    """
    products = jnp.einsum("CE,BQE->CQB", texts, images, preferred_element_type=jnp.float32)
    return constrain(products.max(axis=1))


def normalise(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Float32 vectors divided by their L2 norm, or by 1e-12 if that is larger, as in PyTorch."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def begin_caption(tokens: Int[Array, "B L"], vocab: int) -> Int[Array, "B L"]:
    """Replaces the `[CLS]` at the start of each caption by `[DEC]`, the last vocabulary id.

    BLIP-2 begins captions that are generated with `[DEC]`, and texts that are only read with
    `[CLS]`.
    """
    return tokens.at[:, 0].set(vocab + DEC)


@functools.partial(jax.jit, static_argnums=0)
def init_params(variant: Variant, key: Array) -> dict[str, Any]:
    """Random float32 parameters: {'vision': ..., 'qformer': ..., 'heads': ...}."""
    return dict(Blip2(variant).init(key, method="make_params")["params"])
