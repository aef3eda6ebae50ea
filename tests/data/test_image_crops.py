"""Parts of images for training: drawn at random, mirrored, JPEGs decoded at a smaller size."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from jax_instructblip.data import images
from jax_instructblip.data.images import ImageError
from tests.data.test_images import encoded


class Script:
    """A random generator that returns what the test wrote down."""

    def __init__(self, uniform=(), integers=(), flip=0.9):
        self.draws, self.places, self.flip = list(uniform), list(integers), flip

    def uniform(self, low, high):
        share = self.draws.pop(0)
        return low + share * (high - low)

    def integers(self, low, high):
        self.bounds = (*getattr(self, "bounds", ()), (low, high))
        return self.places.pop(0)

    def random(self):
        return self.flip


def gradient(width, height):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("flip", [0.49, 0.5])
def test_random_crop_by_hand(flip):
    """Half of 100 x 80, as square as can be: 63 x 63 (sqrt 4000 = 63.2), at left 20, top 7."""
    image = gradient(100, 80)
    script = Script([0.0, 0.5], [7, 20], flip)
    found = images.random_resized_crop_flip(image, 32, script)
    assert script.bounds == ((0, 80 - 63 + 1), (0, 100 - 63 + 1))  # top first, then left
    expected = image.crop((20, 7, 83, 70)).resize((32, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(expected)[:, ::-1] if flip < 0.5 else np.asarray(expected)
    np.testing.assert_array_equal(found, expected)


def test_random_crop_tries_again_while_the_part_does_not_fit():
    # The whole area at ratio 4/3 is too wide for a square; the second draw is 71 x 71.
    script = Script([1.0, 1.0, 0.0, 0.5], [0, 0])
    assert images._random_box(100, 100, script, (0.5, 1.0), (3 / 4, 4 / 3)) == (0, 0, 71, 71)


@pytest.mark.parametrize(
    ("size", "box"),
    [((750, 30), (355, 0, 40, 30)), ((30, 750), (0, 355, 30, 40)), ((90, 80), (0, 0, 90, 80))],
)
def test_random_crop_falls_back_to_the_middle(size, box):
    script = Script([1.0, 1.0] * 10)
    ratio = (3 / 4, 4 / 3) if size != (90, 80) else (0.5, 3.0)
    assert images._random_box(*size, script, (0.5, 1.0), ratio) == box
    assert not script.draws


def test_random_crop_is_a_function_of_its_generator_and_keeps_its_bounds():
    image = gradient(200, 160)

    def draw(seed):
        return images.random_resized_crop_flip(image, 24, np.random.default_rng(seed))

    np.testing.assert_array_equal(draw(3), draw(3))
    assert (draw(3) != draw(4)).any()
    boxes = np.array(
        [
            images._random_box(200, 160, np.random.default_rng(s), (0.5, 1.0), (3 / 4, 4 / 3))
            for s in range(500)
        ]
    )
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (left + width <= 200).all()
    assert (top >= 0).all() and (top + height <= 160).all()
    share, ratio = width * height / (200 * 160), width / height
    assert 0.49 < share.min() < 0.52 and 0.9 < share.max() <= 1.0
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.35
    assert {left.min(), top.min()} == {0} and (left + width).max() == 200


def waves(width, height):
    """Smooth, and different everywhere: pixels of another part would be far off."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    pixels = [np.sin(4 * x) ** 2, np.sin(5 * y) ** 2, (x + y) / 2]
    return Image.fromarray((255 * np.stack(pixels, axis=-1)).astype(np.uint8))


def decoded_sizes(monkeypatch):
    """Width and height of the JPEGs that are decoded from now on, as they lie in the file."""
    sizes, decode = [], images.simplejpeg.decode_jpeg

    def spy(*args, **kwargs):
        pixels = decode(*args, **kwargs)
        sizes.append(pixels.shape[1::-1])
        return pixels

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", spy)
    return sizes


def refuse(*args, **kwargs):
    raise ValueError("not that one")


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_reduced_pixels_are_those_of_pillow(monkeypatch, factor, subsampling, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    photo = encoded(waves(901, 603), format="JPEG", exif=exif, quality=90, subsampling=subsampling)
    fast = images._reduced(Image.open(io.BytesIO(photo)), factor)
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", refuse)
    np.testing.assert_array_equal(fast, images._reduced(Image.open(io.BytesIO(photo)), factor))
    assert sorted(fast.size) == [-(-603 // factor), -(-901 // factor)]


def test_reduced_pixels_of_photographs_are_those_of_pillow(monkeypatch, shared):
    photos = [path.read_bytes() for path in sorted((shared / "data/images/coco").glob("*.jpg"))]
    assert len(photos) == 18
    found = [images._reduced(Image.open(io.BytesIO(photo)), 2) for photo in photos]
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", refuse)
    for photo, fast in zip(photos, found, strict=True):
        np.testing.assert_array_equal(fast, images._reduced(Image.open(io.BytesIO(photo)), 2))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colors_than_rgb_are_left_to_pillow(monkeypatch, mode):
    sizes = decoded_sizes(monkeypatch)
    photo = encoded(waves(300, 200).convert(mode), format="JPEG")
    found = images._reduced(Image.open(io.BytesIO(photo)), 2)
    assert (found.mode, found.size, sizes) == ("RGB", (150, 100), [])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("size", "by"), [(200, 2), (100, 4), (50, 8), (400, 1)])
def test_a_reduced_crop_is_the_same_part(monkeypatch, size, by, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    photo = encoded(waves(901, 603), format="JPEG", exif=exif, quality=95)
    for seed in range(10):
        rngs = [np.random.default_rng(seed) for _ in range(2)]
        exact = images.random_resized_crop_flip(photo, size, rngs[0])
        sizes = decoded_sizes(monkeypatch)
        reduced = images.random_resized_crop_flip(photo, size, rngs[1], min_ratio=1.0)
        assert sizes == [(-(-901 // by), -(-603 // by))]
        # Edges are rounded to decoded pixels, and one of the photo is worth about 1.
        assert np.abs(exact.astype(int) - reduced).mean() < 0.5 * by
        assert (exact != reduced).any() == (by > 1)
        assert rngs[0].random() == rngs[1].random()


def test_only_jpeg_files_are_reduced_and_the_callers_image_is_not():
    picture = waves(300, 200)
    for source in (picture, encoded(picture, format="PNG")):
        found = [
            images.random_resized_crop_flip(
                source, 16, np.random.default_rng(0), min_ratio=min_ratio
            )
            for min_ratio in (0.0, np.inf, 0.1)
        ]
        for other in found[1:]:
            np.testing.assert_array_equal(found[0], other)
    with Image.open(io.BytesIO(encoded(picture, format="JPEG"))) as opened:
        images.random_resized_crop_flip(opened, 16, np.random.default_rng(0), min_ratio=0.1)
        assert opened.size == (300, 200)


@pytest.mark.parametrize(
    ("pixels", "min_pixels", "by"),
    [(400, 100, 2), (399, 100, 1), (1600, 100, 4), (6400, 100, 8), (9**9, 100, 8), (9, np.inf, 1)],
)
def test_reduction_keeps_the_minimum(pixels, min_pixels, by):
    assert images._reduction(pixels, min_pixels) == by


def test_a_damaged_jpeg_is_named_when_reduced():
    photo = encoded(waves(600, 400), format="JPEG")
    with pytest.raises(ImageError, match="damaged"):
        images.random_resized_crop_flip(
            photo[: len(photo) // 2], 16, np.random.default_rng(0), min_ratio=1.0
        )
