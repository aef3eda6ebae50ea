import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.models.vision import VisionTransformer, normalise
from tests.helpers.numerics import error, random_params, small

CONFIG = small("t5").vision
PARAMS = jax.tree.map(jnp.asarray, random_params(small("t5"))["vision"])
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8)


def test_normalise_takes_uint8_through_the_clip_statistics():
    found = normalise(jnp.asarray(PIXELS))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert found.dtype == jnp.float32
    assert error(found, (PIXELS / 255 - mean) / std) < 1e-6


def test_normalise_leaves_floats_alone():
    images = jnp.ones((1, 2, 2, 3), jnp.bfloat16)
    assert normalise(images) is images


def test_a_tower_of_silent_layers_gives_patches_row_by_row():
    # Layers whose outputs are 0 add nothing: what is left is CLS, patches and positions.
    layers = jax.tree.map(jnp.zeros_like, PARAMS["layers"])
    kernel = jnp.zeros_like(PARAMS["patch_embed"]["kernel"]).at[:, :, 0, 0].set(1 / 14**2)
    params = {
        **PARAMS,
        "layers": layers,
        "patch_embed": {"kernel": kernel, "bias": jnp.zeros(CONFIG.width)},
    }
    images = jnp.zeros((1, 56, 56, 3)).at[0, 14:28, 28:42, 0].set(5.0)  # row 1, column 2 of 4 x 4
    found = jax.jit(VisionTransformer(CONFIG, jnp.float32).apply)({"params": params}, images)
    found -= params["pos_embed"]
    assert found.shape == (1, CONFIG.tokens, CONFIG.width) == (1, 17, 88)
    np.testing.assert_allclose(found[0, 0], params["cls"][0, 0], atol=1e-6)
    expected = np.zeros(16)
    expected[1 * 4 + 2] = 5.0
    np.testing.assert_allclose(found[0, 1:, 0], expected, atol=1e-4)


def test_images_do_not_see_each_other():
    apply = jax.jit(VisionTransformer(CONFIG, jnp.float32).apply)
    both = apply({"params": PARAMS}, jnp.asarray(PIXELS))
    swapped = apply({"params": PARAMS}, jnp.asarray(PIXELS[::-1]))
    assert error(swapped[::-1], both) < 1e-6
    assert error(both[1], both[0]) > 0.1  # the two images differ


def test_large_activations_stay_finite_in_bfloat16():
    params = jax.tree.map(lambda leaf: leaf, PARAMS)
    params["pos_embed"] = 1e4 * PARAMS["pos_embed"]
    found = jax.jit(VisionTransformer(CONFIG, jnp.bfloat16).apply)({"params": params}, PIXELS)
    assert found.dtype == jnp.float32  # of the residual stream
    assert jnp.isfinite(found).all() and jnp.abs(found).max() > 1e4


def test_images_of_another_size_are_refused():
    module = VisionTransformer(dataclasses.replace(CONFIG, image_size=28), jnp.float32)
    with pytest.raises(ValueError, match=r"\(2, 56, 56, 3\), expected \[B, 28, 28, 3\]"):
        module.apply({"params": PARAMS}, jnp.asarray(PIXELS))
