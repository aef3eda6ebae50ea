"""The ten operations of RandAugment, each on hand-made pixels, and how they are drawn."""

import collections

import numpy as np
import pytest
from PIL import Image

from jax_instructblip.data import rand_augment
from jax_instructblip.data.rand_augment import FILL, TABLE

SIDE = 21


@pytest.fixture
def image():
    noise = np.random.default_rng(0).integers(40, 200, (SIDE, SIDE, 3))
    return Image.fromarray(noise.astype(np.uint8))


@pytest.mark.parametrize("name", ["Identity", "Brightness", "Sharpness"])
def test_those_of_factor_one_change_nothing(image, name):
    assert (np.asarray(TABLE[name](image, 1.0)) == np.asarray(image)).all()


def test_contrast_is_stretched_and_levels_are_made_even(image):
    stretched = np.asarray(TABLE["AutoContrast"](image, 1.0))
    assert (stretched.min((0, 1)) == 0).all() and (stretched.max((0, 1)) == 255).all()
    levels = np.repeat(np.array([10, 20, 30, 40], np.uint8), 2550).reshape(102, 100)
    even = np.asarray(TABLE["Equalize"](Image.fromarray(levels).convert("RGB"), 1.0))
    assert sorted(np.unique(even)) == [0, 85, 170, 255]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_translation_moves_by_five_pixels_and_fills_with_gray(image, sign):
    pixels = np.asarray(image)
    across = np.asarray(TABLE["TranslateX"](image, sign))
    down = np.asarray(TABLE["TranslateY"](image, sign))
    if sign > 0:
        assert (across[:, 5:] == pixels[:, :-5]).all() and (across[:, :5] == FILL).all()
        assert (down[5:] == pixels[:-5]).all() and (down[:5] == FILL).all()
    else:
        assert (across[:, :-5] == pixels[:, 5:]).all() and (across[:, -5:] == FILL).all()
        assert (down[:-5] == pixels[5:]).all() and (down[-5:] == FILL).all()


def line(place, across):
    pixels = np.full((101, 101, 3), 0, np.uint8)
    pixels[(slice(None), place) if across else (place, slice(None))] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("name", "across"), [("ShearX", True), ("ShearY", False)])
def test_a_shear_leans_a_line_by_three_parts_in_twenty(name, across):
    leaned = np.asarray(TABLE[name](line(40, across), 1.0))[..., 0].astype(int)
    leaned = leaned if across else leaned.T
    places = [int(np.argmax(np.where(row == 128, 0, row))) for row in leaned[10:91]]
    steps = np.polyfit(range(81), places, 1)[0]
    assert abs(steps) == pytest.approx(0.15, abs=0.01)


def test_a_rotation_is_of_fifteen_degrees_about_the_middle():
    turned = np.asarray(TABLE["Rotate"](line(50, True), 1.0))[..., 0].astype(int)
    rows, columns = np.nonzero(turned > 150)
    slope = np.polyfit(rows, columns, 1)[0]
    assert abs(slope) == pytest.approx(np.tan(np.radians(15)), abs=0.02)
    assert turned[50, 50] > 150 and turned[0, 0] == 128


def test_two_operations_are_drawn_each_left_out_half_of_the_time(monkeypatch):
    counts, signs = collections.Counter(), collections.Counter()
    table = {
        name: lambda image, sign, name=name: counts.update([name]) or signs.update([sign]) or image
        for name in TABLE
    }
    monkeypatch.setattr(rand_augment, "TABLE", table)
    pixels, rng, draws = np.zeros((2, 2, 3), np.uint8), np.random.default_rng(0), 4_000
    for _ in range(draws):
        rand_augment.rand_augment(pixels, rng)
    assert len(counts) == 10 and counts.total() == pytest.approx(draws, rel=0.05)
    assert all(count == pytest.approx(draws / 10, rel=0.2) for count in counts.values())
    assert signs[1.0] == pytest.approx(draws / 2, rel=0.1)


def test_the_same_numbers_give_the_same_pixels(image):
    pixels = np.asarray(image)
    both = [rand_augment.rand_augment(pixels, np.random.default_rng(3)) for _ in range(2)]
    assert (both[0] == both[1]).all() and both[0].shape == pixels.shape
