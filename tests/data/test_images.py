import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.llava import image_processing_pil_llava

from jax_instructblip.data import images
from jax_instructblip.data.images import (
    ImageError,
    decode,
    random_resized_crop_flip,
    resize_center_crop,
)
from jax_instructblip.models.variants import IMAGE_MEAN, IMAGE_STD

# Files of `difficult` that cannot be used, and why.
REFUSED = {
    "16bit.cropped.tif": "has 16-bit pixels, but none brighter than 694 of 65535",
    "png_decompression_dos.png": "Decompressed data too large",
    "truncated.jpg": "Truncated File Read",
    "truncated_image.png": "image file is truncated",
    "truncated_jpeg.jpg": "image file is truncated",
    "unknown_compression_method.png": "not an image that can be read",
    "zero_width.gif": "not an image that can be read",
}


@pytest.fixture(scope="module")
def photos(shared):
    return shared / "data" / "images"


@pytest.fixture(scope="module")
def info(photos):
    return json.loads((photos / "INFO.json").read_text())


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def test_every_difficult_file_is_decoded_right_or_refused(photos, info):
    files = sorted((photos / "difficult").iterdir())
    assert len(files) > 50
    for path in files:
        facts = info[f"difficult/{path.name}"]
        if path.name in REFUSED:
            with pytest.raises(ImageError) as error:
                decode(path)
            assert str(error.value).startswith(f"{path}: ") and REFUSED[path.name] in str(
                error.value
            )
            continue
        assert facts["decodes"], path.name
        image = decode(path)
        width, height = facts["size"]
        if facts.get("exif_orientation", 1) >= 5:
            width, height = height, width
        assert (image.mode, image.size) == ("RGB", (width, height)), path.name
        with path.open("rb") as file, Image.open(file) as reference:
            if reference.mode != "I;16":
                reference = ImageOps.exif_transpose(reference).convert("RGB")
                np.testing.assert_array_equal(np.asarray(image), np.asarray(reference), path.name)
    assert all(name in {path.name for path in files} for name in REFUSED)


def test_rotated_photographs_look_like_the_upright_one(photos):
    def small(name):
        return images.resize_squash(decode(photos / "difficult" / name), 16).astype(float)

    upright = small("hopper.jpg")
    for orientation in (2, 3, 4, 5, 6, 8):
        error = np.abs(small(f"hopper_orientation_{orientation}.jpg") - upright).mean()
        assert error < 6, (orientation, error)  # JPEG noise; the image mirrored differs by 40
    assert np.abs(upright[:, ::-1] - upright).mean() > 20
    pair = small("exif_Landscape_6.jpg"), small("exif_Landscape_8.jpg")
    assert np.abs(pair[0] - pair[1]).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_every_orientation_of_every_format(orientation, format):
    quadrants = np.kron([[0, 80], [160, 240]], np.ones((24, 32))).astype(np.uint8)
    upright = Image.fromarray(quadrants).convert("RGB")
    # What a camera that is held this way stores: the inverse of what makes it upright.
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = undo.get(orientation, images._UPRIGHT.get(orientation))
    stored = upright.transpose(turn) if turn is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(stored, format=format, exif=exif))
    assert found.size == upright.size
    np.testing.assert_allclose(np.asarray(found), np.asarray(upright), atol=12)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_photograph_may_be_left_as_it_lies_in_the_file(orientation):
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 4, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(stored, format="PNG", exif=exif)
    assert (np.asarray(decode(raw, upright=False)) == np.asarray(stored)).all()
    rng = lambda: np.random.default_rng(1)
    lying = random_resized_crop_flip(raw, 4, rng(), upright=False)
    assert (lying == random_resized_crop_flip(stored, 4, rng())).all()
    jpeg = encoded(stored.resize((400, 600)), format="JPEG", exif=exif, quality=95)
    plain = encoded(stored.resize((400, 600)), format="JPEG", quality=95)
    for ratio in (0.0, 0.6):
        lying = random_resized_crop_flip(jpeg, 8, rng(), min_ratio=ratio, upright=False)
        assert (lying == random_resized_crop_flip(plain, 8, rng(), min_ratio=ratio)).all()


@pytest.mark.parametrize(("width", "height"), [(60, 20), (20, 61), (20, 20), (7, 9)])
def test_the_middle_is_shown_with_its_shorter_side_scaled(width, height):
    """Columns tell where they were: the middle ones are seen, at the scale of both sides."""
    ramp = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3))
    found = resize_center_crop(Image.fromarray(ramp.copy()), 20)
    assert found.shape == (20, 20, 3)
    scale = 20 / min(width, height)
    middle = found[10, 9:11, 0].mean()
    assert middle == pytest.approx((width - 1) / 2, abs=1.0)
    step = (float(found[10, 15, 0]) - float(found[10, 5, 0])) / 10
    assert step == pytest.approx(1 / scale, abs=0.15)


def test_sixteen_bits_keep_their_high_byte(photos):
    path = photos / "difficult" / "pngsuite_basn0g16.png"
    with Image.open(path) as raw:
        assert raw.mode == "I;16"
        high_byte = np.asarray(raw) >> 8
    found = np.asarray(decode(path))
    for channel in range(3):
        np.testing.assert_array_equal(found[:, :, channel], high_byte)
    assert len(np.unique(found)) > 100  # Pillow's own conversion leaves almost all white
    # A picture of 8 bits in a file of 16 is that picture.
    of_eight_bits = np.asarray(decode(photos / "difficult" / "l_trns.png"))
    np.testing.assert_array_equal(
        np.asarray(decode(photos / "difficult" / "i_trns.png")), of_eight_bits
    )
    black = Image.fromarray(np.zeros((2, 2), np.uint16))
    assert not np.asarray(decode(black)).any()


def test_pixels_without_known_range_are_refused():
    with pytest.raises(ImageError, match="floating-point pixels"):
        decode(Image.fromarray(np.ones((2, 2), np.float32)))
    with pytest.raises(ImageError, match="32-bit pixels from -1 to 70000"):
        decode(Image.fromarray(np.array([[-1, 70000]], np.int32)))


def test_transparency_is_dropped_not_blended():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 3
    assert np.asarray(decode(encoded(Image.fromarray(rgba))))[0, 0].tolist() == [200, 0, 0]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


def bomb(width, height):
    """A valid PNG header that promises width x height pixels, and nothing behind it."""

    def chunk(name, data):
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_pixel_limit_is_checked_before_decoding(photos):
    # Were it decoded first, the reason would be that the data is truncated.
    with pytest.raises(ImageError, match=r"9000 x 9000 pixels, more than the limit of 80000000"):
        decode(bomb(9000, 9000), max_pixels=80_000_000)
    with pytest.raises(ImageError, match="damaged or unreadable"):
        decode(bomb(100, 100))
    with pytest.raises(ImageError, match="too large even for Pillow"):
        decode(bomb(60_000, 60_000))
    path = photos / "difficult" / "flower.jpg"
    assert decode(path, max_pixels=480 * 360).size == (480, 360)
    with pytest.raises(ImageError, match=r"flower\.jpg: 480 x 360 pixels, more than .* 172799"):
        decode(path, max_pixels=480 * 360 - 1)
    with pytest.raises(ImageError, match="more than the limit of 3"):
        decode(np.zeros((2, 2, 3), np.uint8), max_pixels=3)


def test_sources_of_every_kind_give_the_same_pixels(photos):
    path = photos / "difficult" / "hopper.png"
    expected = np.asarray(decode(path))
    with Image.open(path) as opened:
        for source in (str(path), path.read_bytes(), opened, expected):
            np.testing.assert_array_equal(np.asarray(decode(source)), expected)
    gray = expected[:, :, 0]
    for array in (gray, gray[:, :, None]):
        np.testing.assert_array_equal(np.asarray(decode(array))[:, :, 2], gray)


def test_equal_indices_of_two_palettes_are_two_images():
    one = Image.new("P", (4, 4), 1)
    other = one.copy()
    one.putpalette([0, 0, 0, 255, 0, 0])
    other.putpalette([0, 0, 0, 0, 0, 255])
    assert decode(one).getpixel((0, 0)) != decode(other).getpixel((0, 0))
    assert images.content_digest(one) != images.content_digest(other)
    assert images.content_digest(one) == images.content_digest(one.copy())


def test_the_image_that_is_given_stays_as_it_is():
    image = Image.new("RGB", (4, 2))
    found = decode(image)
    found.putpixel((0, 0), (9, 9, 9))
    assert image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("/no/such/file.jpg", "/no/such/file.jpg: no such file"),
        (Path("/"), "/: is not a file"),
        (b"", "image of 0 bytes: not an image that can be read"),
        (b"<html>", "image of 6 bytes: not an image"),
        (3, "given as int, expected a path"),
        (np.zeros((2, 2, 3), np.float32), "has dtype float32, expected uint8"),
        (np.zeros((2, 2, 2), np.uint8), r"has shape \(2, 2, 2\)"),
        (np.zeros((0, 2, 3), np.uint8), "has no pixels"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"has shape \(1, 2, 2, 3\)"),
    ],
)
def test_what_is_no_image_is_refused_with_its_name(source, reason):
    with pytest.raises(ImageError, match=reason):
        decode(source)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="is not a file"):
        decode(tmp_path / "pipe.jpg")


def test_no_format_that_runs_other_programs():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\n"
    with pytest.raises(ImageError, match="not an image that can be read"):
        decode(eps)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_files_raise_nothing_else(format):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    data = bytearray(encoded(image, format=format))
    for _ in range(60):
        copy = bytearray(data[: rng.integers(1, len(data))] if rng.random() < 0.5 else data)
        for index in rng.integers(0, len(copy), 4):
            copy[index] = rng.integers(256)
        try:
            assert decode(bytes(copy), max_pixels=10_000).mode == "RGB"
        except ImageError as error:
            assert str(error)


def test_evaluation_pixels_are_pillow_bit_for_bit(photos, info):
    """Every healthy photograph has Pillow's bicubic squash, then the CLIP normalisation."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
    checked = 0
    for name in info:
        if name.startswith("difficult/"):
            continue
        with Image.open(photos / name) as image:
            expected = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        pixels = images.resize_squash(decode(photos / name), 224)
        assert pixels.dtype == np.uint8 and pixels.shape == (224, 224, 3)
        expected = (np.asarray(expected, np.float32) / 255 - mean) / std
        found = (pixels.astype(np.float32) / 255 - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
        np.testing.assert_array_equal(found, expected, name)
        checked += 1
    assert checked > 40


@pytest.mark.parametrize("size", [(40, 40), (45, 40), (43, 40), (61, 33), (33, 61), (90, 31)])
@pytest.mark.parametrize("crop", ["clip", "pad"])
def test_llava_sees_the_pixels_of_transformers(crop, size):
    """The middle (LLaVA v1), or all on a square of the mean color (v1.5)."""
    processor = image_processing_pil_llava.LlavaImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_pad=crop == "pad"
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    plain = dict(do_rescale=False, do_normalize=False, return_tensors="np")
    expected = processor(image, **plain).pixel_values[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(images.CROPS[crop](image, 28), expected)
