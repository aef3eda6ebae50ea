"""Positions resized to images of another size: against torch, the original code, and whole runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.conversion.positions import (
    cubic_weights,
    fit_positions,
    resize_note,
    resize_positions,
)
from jax_instructblip.models.released import CLIP_VIT_L
from jax_instructblip.models.variants import VisionConfig
from jax_instructblip.models.vision import VisionTransformer
from tests.helpers import golden_blip2
from tests.helpers.golden import GOLDEN
from tests.helpers.numerics import error

# Of tables of numbers near 1. PyTorch in float32 rounds the places of the patches, which alone is
# 5e-6; in float64 it does not.
ROUNDED, EXACT = 1e-5, 2e-6


def table(side, width=5, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((1, 1 + side * side, width)).astype(np.float32)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("old", "new"), [(16, 26), (16, 35), (16, 9), (4, 6), (3, 1), (1, 4)])
def test_equals_torch(old, new, align_corners):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    ours = table(old)
    grid = torch.tensor(ours[:, 1:]).double().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid, size=(new, new), mode="bicubic", align_corners=align_corners
    )
    expected = expected.permute(0, 2, 3, 1).reshape(1, new * new, -1).numpy()
    found = resize_positions(ours, new, align_corners=align_corners)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:, 0], ours[:, 0])
    np.testing.assert_allclose(found[:, 1:], expected, atol=EXACT)


def test_rows_of_weights_sum_to_1_and_the_border_stays():
    weights = cubic_weights(16, 35)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(cubic_weights(7, 7), np.eye(7))
    corners = cubic_weights(16, 35, align_corners=True)
    np.testing.assert_array_equal(corners[[0, -1]], np.eye(16)[[0, -1]])
    assert weights[0, 0] != 1


@pytest.mark.parametrize(("old", "new"), [(4, 6), (4, 3), (16, 26), (16, 35)])
def test_equals_the_original_code(shared, old, new):
    with np.load(GOLDEN / "eva_interp" / "inputs.npz") as inputs:
        given = inputs[f"pos_embed_{old}_for_{new}"]
    with np.load(GOLDEN / "eva_interp" / "outputs.npz") as outputs:
        expected = outputs[f"pos_embed_{old}_to_{new}"]
    found = resize_positions(given, new)
    assert np.abs(found - given[:, :1]).max() > 0.01
    np.testing.assert_allclose(found, expected, atol=ROUNDED)


def test_the_original_tower_at_another_size(shared, tmp_path):
    params = golden_blip2.params(tmp_path / "recorded")["vision"]
    vision = dataclasses.replace(golden_blip2.variant().vision, image_size=84)
    positions = fit_positions("vision/pos_embed", np.asarray(params["pos_embed"]), vision)
    with np.load(GOLDEN / "eva_interp" / "inputs.npz") as inputs:
        image = inputs["image84"].transpose(0, 2, 3, 1)
    with np.load(GOLDEN / "eva_interp" / "outputs.npz") as outputs:
        np.testing.assert_allclose(positions, outputs["vit84/pos_embed"], atol=ROUNDED)
        expected = outputs["vit84/out"]
    params = {**params, "pos_embed": jnp.asarray(positions)}
    found = jax.jit(VisionTransformer(vision, jnp.float32).apply)({"params": params}, image)
    assert error(found, expected) < 1e-4


def test_a_table_without_a_square_of_patches_is_named():
    for shape in ((1, 12, 5), (1, 1, 5), (2, 17, 5), (17, 5)):
        with pytest.raises(ValueError, match=r"vision/pos_embed has the shape .*1 \+ N x N") as e:
            resize_positions(np.zeros(shape, np.float32), 6)
        assert str(list(shape)) in str(e.value)


def test_other_leaves_and_tables_of_the_right_size_stay_as_they_are():
    vision = VisionConfig(image_size=56, width=5, heads=1)
    for path, leaf in (("vision/cls", np.ones((1, 1, 5))), ("vision/pos_embed", table(4))):
        assert fit_positions(path, leaf, vision) is leaf
    assert resize_note(vision, vision) == ""
    note = resize_note(vision, dataclasses.replace(vision, image_size=84))
    assert "images of 84 pixels a side, the base is of 56" in note and "4 x 4 to 6 x 6" in note


def test_half_precision_is_widened_and_clip_keeps_its_corners():
    half = table(4).astype(np.float16)
    clip = dataclasses.replace(CLIP_VIT_L, image_size=84, width=5, heads=1)
    found = fit_positions("vision/pos_embed", half, clip)
    assert found.dtype == np.float32
    grid = found[0, 1:].reshape(6, 6, 5)
    np.testing.assert_array_equal(grid[0, 0], half[0, 1])  # the first patch
    np.testing.assert_array_equal(grid[-1, -1], half[0, -1])
