"""BLIP-2's first stage on one page: image and text to features, a match, a caption.

    images  [B, H, W, 3]     captions  [B, L] BERT ids, `[CLS] ... [SEP]`
       --vision-->  patches [B, P, Dv]                  frozen, or trained in fine-tuning
       --Q-Former, image alone-->  queries --project, normalise-->  image features [B, Q, E]
       --Q-Former, text alone-->   [CLS]   --project, normalise-->  text features  [B, E]
       --Q-Former, both-->         queries --mean of a two-way head-->  match [B, 2]
       --Q-Former, text behind the queries' keys and values-->  caption logits [B, L, V]

There is no language model: what is trained are the Q-Former and the four `heads`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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

TEMPERATURE = 0.07  # of the similarities, at the start; learned, and not clamped
DEC = -1  # the last id of the vocabulary, [DEC], begins a caption that is written


class CaptionHead(nn.Module):
    """BERT's head: vocabulary logits of text outputs, tied to the word embeddings."""

    config: QFormerConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], table: Float[Array, "V D"]) -> Float[Array, "*B V"]:
        """Float32 logits; `table` are the word embeddings."""
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
    """Heads on the Q-Former's outputs: two projections, the match, the caption, a temperature."""

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


class Blip2(Network):
    """The model of the first stage; `dtype` is what it computes in."""

    variant: Variant
    dtype: Any = jnp.float32
    scans: Scans = Scans()

    def setup(self):
        v, c = self.variant, self.variant.qformer
        self.vision = VisionTransformer(v.vision, self.dtype, self.scans.vision)
        self.qformer = QFormer(c, self.dtype, self.scans.qformer)
        self.heads = Heads(c, self.dtype)

    def encode_image(self, images: Array) -> Float[Array, "B P Dv"]:
        """Patch features of `images` [B, H, W, 3], uint8 or normalised floats."""
        return self.vision(images)

    def image_features(
        self, patches: Float[Array, "B P Dv"], train: bool = False, return_kv: bool = False
    ) -> tuple[Float[Array, "B Q E"], Any]:
        """Normalised features of each query; with `return_kv` what `caption_logits` takes."""
        x, kv = self.qformer.read_image(patches, train, return_kv)
        return normalise(self.heads.image_projection(x)), kv

    def text_features(
        self, tokens: Int[Array, "B L"], valid: Bool[Array, "B L"], train: bool = False
    ) -> Float[Array, "B E"]:
        """Normalised features of each text, those of its `[CLS]`."""
        x = self.qformer.read_text(tokens, valid, train)
        return normalise(self.heads.text_projection(x[:, 0]))

    def image_kv(self, patches: Float[Array, "G P Dv"]) -> Any:
        """Keys and values of the patches in every layer that looks: `match_logits` takes them."""
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
        """Outputs of the queries that saw an image and a text together."""
        return self.qformer.read_both(patches, tokens, valid)

    def project_image(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        """Raw features of images in the space that both share, not normalised."""
        return self.heads.image_projection(x)

    def project_text(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        """Raw features of texts in the space that both share, not normalised."""
        return self.heads.text_projection(x)

    def match_logits(
        self,
        patches: Any,
        tokens: Int[Array, "B L"],
        valid: Bool[Array, "B L"],
        train: bool = False,
    ) -> Float[Array, "B 2"]:
        """Float32 logits of (no match, match) of each image with the text, or texts, beside it.

        `patches` [G, P, Dv], or their `image_kv`.
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
        """Float32 logits of the token after each of `tokens`, which begin with `[DEC]`."""
        x = self.qformer.write_text(tokens, valid, kv, train)
        return self.heads.caption(x, self.qformer.word_table())

    def temperature(self) -> Float[Array, ""]:
        """The learned divisor of similarities, where there is a caption head as well."""
        return self.heads.temp.astype(jnp.float32)

    def make_params(self) -> None:
        """Runs every part once on inputs of the smallest shapes, for `init`."""
        size, ones = self.variant.vision.image_size, jnp.ones((1, 2), jnp.int32)
        patches = self.encode_image(jnp.zeros((1, size, size, 3), jnp.uint8))
        _, kv = self.image_features(patches, return_kv=True)
        self.text_features(ones, ones > 0)
        self.match_logits(patches, ones, ones > 0)
        if self.variant.qformer.caption_head:
            self.caption_logits(ones, ones > 0, kv)


def image_to_text(images: Float[Array, "B Q E"], texts: Float[Array, "C E"]) -> Float[Array, "B C"]:
    """The similarity of each image and each text, that of the image's nearest query; float32.

    Rows stay on the devices of their images; the texts come to all.
    """
    products = jnp.einsum("BQE,CE->BQC", images, texts, preferred_element_type=jnp.float32)
    return constrain(products.max(axis=1))


def text_to_image(texts: Float[Array, "C E"], images: Float[Array, "B Q E"]) -> Float[Array, "C B"]:
    """The same similarities, a row a text: rows stay on the devices of their texts."""
    products = jnp.einsum("CE,BQE->CQB", texts, images, preferred_element_type=jnp.float32)
    return constrain(products.max(axis=1))


def normalise(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Float32 vectors of length 1 (of at least 1e-12 before, as in PyTorch)."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def begin_caption(tokens: Int[Array, "B L"], vocab: int) -> Int[Array, "B L"]:
    """The ids of a caption that is written: `[DEC]`, the last of the vocabulary, for `[CLS]`."""
    return tokens.at[:, 0].set(vocab + DEC)


def init_params(variant: Variant, key: Array) -> dict[str, Any]:
    """Random float32 parameters: {'vision': ..., 'qformer': ..., 'heads': ...}."""
    return dict(Blip2(variant).init(key, method="make_params")["params"])
