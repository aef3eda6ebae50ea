"""Functions of the first stage that a `Retriever` compiles, each from inputs to results."""

from typing import Any

import jax

from jax_instructblip.models.blip2 import Blip2, image_to_text


def features_of_images(model: Blip2, images: jax.Array, form: str) -> jax.Array:
    """Features [N, Q, E] of images in one of the forms of `feature_forms.py`; [N, Q, D] if raw."""
    patches = model.encode_image(images)
    if form == "normalised":
        return model.image_features(patches)[0]
    x = model.raw_features(patches)
    return x if form == "raw" else model.project_image(x)


def features_of_texts(model: Blip2, ids: jax.Array, valid: jax.Array, form: str) -> jax.Array:
    """Features [M, E] of texts in one of the forms of `feature_forms.py`; [M, D] if raw."""
    if form == "normalised":
        return model.text_features(ids, valid)
    x = model.raw_text_features(ids, valid)
    return x if form == "raw" else model.project_text(x)


def features_of_pairs(model: Blip2, images: Any, ids: Any, valid: Any) -> jax.Array:
    """Raw features [N, Q, D] of image i together with text i."""
    return model.pair_features(model.encode_image(images), ids, valid)


def match_images(model: Blip2, images: Any, ids: Any, valid: Any) -> jax.Array:
    """Match logits [N, 2] of image i and text i."""
    return model.match_logits(model.encode_image(images), ids, valid)


def kv_of_images(model: Blip2, images: Any) -> Any:
    """Keys and values of each image in every layer with cross-attention."""
    return model.image_kv(model.encode_image(images))


def match_kv(model: Blip2, kv: Any, index: Any, ids: Any, valid: Any) -> jax.Array:
    """Match logits [B, 2] of blocks of texts; block i belongs to image `index[i]` of `kv`."""
    chosen = jax.tree.map(lambda leaf: leaf[:, index], kv)
    return model.match_logits(chosen, ids, valid)


def similarities(images: jax.Array, texts: jax.Array) -> jax.Array:
    """Similarities [N, M] of features, with float32 products on every kind of device."""
    with jax.default_matmul_precision("highest"):
        return image_to_text(images, texts)
