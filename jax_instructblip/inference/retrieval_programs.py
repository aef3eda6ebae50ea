"""Functions of the first stage that a `Retriever` compiles, each from inputs to results.

`images` are [N, H, W, 3] uint8; `ids` and `valid` [N, L] (or [M, L], [B, L]) are BERT ids of texts
and a mask that is False on padding, as `CaptionTokenizer.encode` returns them.
"""

from typing import Any

import jax

from jax_instructblip.models.blip2 import Blip2, image_to_text


def features_of_images(model: Blip2, images: jax.Array, form: str) -> jax.Array:
    """Features `[N, Q, E]` of images, `[N, Q, D]` if raw; `form` is in `feature_forms.FORMS`."""
    patches = model.encode_image(images)
    if form == "normalised":
        return model.image_features(patches)[0]
    x = model.raw_features(patches)
    return x if form == "raw" else model.project_image(x)


def features_of_texts(model: Blip2, ids: jax.Array, valid: jax.Array, form: str) -> jax.Array:
    """Features `[M, E]` of texts, `[M, D]` if raw; `form` is in `feature_forms.FORMS`."""
    if form == "normalised":
        return model.text_features(ids, valid)
    x = model.raw_text_features(ids, valid)
    return x if form == "raw" else model.project_text(x)


def features_of_pairs(model: Blip2, images: Any, ids: Any, valid: Any) -> jax.Array:
    """Raw features `[N, Q, D]` of image i together with text i."""
    return model.pair_features(model.encode_image(images), ids, valid)


def match_images(model: Blip2, images: Any, ids: Any, valid: Any) -> jax.Array:
    """Float32 logits `[N, 2]` of (no match, match) of image i and text i."""
    return model.match_logits(model.encode_image(images), ids, valid)


def kv_of_images(model: Blip2, images: Any) -> Any:
    """Keys and values of each image in every layer with cross-attention, for `match_kv`.

    They are {"key": ..., "value": ...}, each `[Y, N, P, heads, head width]`, for Y such layers and
    the P patches of an image.
    """
    return model.image_kv(model.encode_image(images))


def match_kv(model: Blip2, kv: Any, index: Any, ids: Any, valid: Any) -> jax.Array:
    """Float32 logits `[B, 2]` of (no match, match) of B texts, each with one image.

    `kv` is the result of `kv_of_images`, `index` `[k]` has the numbers of images in it. The first
    B / k texts are matched with image `index[0]`, as many further ones with `index[1]`, and so on.
    """
    chosen = jax.tree.map(lambda leaf: leaf[:, index], kv)
    return model.match_logits(chosen, ids, valid)


def similarities(images: jax.Array, texts: jax.Array) -> jax.Array:
    """Float32 similarities `[N, M]` of features: images `[N, Q, E]`, texts `[M, E]`.

    Products are float32 on every kind of device; the largest over an image's queries counts.
    """
    with jax.default_matmul_precision("highest"):
        return image_to_text(images, texts)
