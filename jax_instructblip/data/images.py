"""From an image file to uint8 pixels: decode, then squash (evaluation) or crop and flip (training).

Everything is done with Pillow on one image, so that pixels are bit-equal to the released code's;
the normalisation with the CLIP mean and standard deviation happens on the device.
"""

import contextlib
import io
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from jax_instructblip import remote
from jax_instructblip.files import FileSlice, address_problem

# As Pillow's own warning limit: above it decoding takes more than 250 MB.
MAX_PIXELS = 89_478_485

# None that runs other programs (EPS), is a container of anything, or holds no photographs.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()
_KNOWN_FORMATS = tuple(name for name in _FORMATS if name in Image.OPEN)

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations of pictures whose width and height are exchanged

# EXIF orientation -> what makes the picture upright; 1 is upright already.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


Source = str | os.PathLike[str] | bytes | FileSlice | Image.Image | np.ndarray


class ImageError(ValueError):
    """An image cannot be used; the message names the file and the reason."""


def decode(source: Source, *, max_pixels: int = MAX_PIXELS, upright: bool = True) -> Image.Image:
    """An RGB image of 8 bits a channel, or an `ImageError` with file name and reason.

    `source` is a path, an address of a store, a member of a tar, the bytes of an image file, a PIL
    image or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. The EXIF orientation is
    applied where `upright` (the released code leaves photographs as they lie in the file); of an
    animation the first frame is taken; transparency is dropped, not blended (Pillow's
    `convert("RGB")`, as in the released code); 16-bit gray keeps its high byte, as Pillow does for
    16-bit colour. The number of pixels is compared with `max_pixels` before any pixel is decoded.
    """
    with _opened(source, max_pixels) as image:
        return _rgb(image, upright)


def resize_squash(image: Image.Image, size: int) -> np.ndarray:
    """Pixels [size, size, 3] uint8 of the whole image, its aspect ratio not kept (evaluation).

    Bicubic with antialiasing, the released `blip_image_eval`.
    """
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def resize_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Pixels [size, size, 3] uint8 of the middle, the shorter side scaled to `size` (evaluation).

    Bicubic with antialiasing, the released `clip_image_eval`.
    """
    short = min(image.size)
    width, height = (size * each // short for each in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


# What an evaluation sees of an image.
CROPS = {"squash": resize_squash, "center": resize_center_crop}


def random_resized_crop_flip(
    source: Source,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    min_ratio: float = 0.0,
    max_pixels: int = MAX_PIXELS,
    upright: bool = True,
) -> np.ndarray:
    """Pixels [size, size, 3] uint8 of a random part of the image, mirrored half of the time.

    `scale` bounds the part's share of the area, `ratio` its width / height; the released
    `blip2_image_train` (torchvision's RandomResizedCrop, bicubic, and RandomHorizontalFlip).

    A JPEG is decoded at a half, a quarter or an eighth of its sides where the part then still has
    `min_ratio` times size x size pixels; 0 or inf: never. The part is the same one, its pixels
    differ a little (the decoder averages blocks, and with `min_ratio` below 1 a part may be
    enlarged again). Sources, `upright` and errors are as in `decode`.
    """
    with _opened(source, max_pixels) as image:
        # The header of a JPEG tells its size; a TIFF turns itself while it is decoded.
        reducible = image.format == "JPEG" and image is not source and 0 < min_ratio < math.inf
        if not reducible:
            image = _rgb(image, upright)
        width, height = image.size
        if reducible and upright and _orientation(image) in _SIDEWAYS:
            width, height = height, width
        box = _random_box(width, height, rng, scale, ratio)
        if reducible:
            factor = _reduction(box[2] * box[3], min_ratio * size * size)
            image = _reduced(image, factor, upright)
    across, down = image.width / width, image.height / height  # 1, or less where it is reduced
    left, top = round(box[0] * across), round(box[1] * down)
    right, bottom = round((box[0] + box[2]) * across), round((box[1] + box[3]) * down)
    # Cropping first matters: resize(box=...) would look at pixels outside of the box.
    part = image.crop((left, top, right, bottom))
    part = part.resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part)


class _UnusableError(Exception):
    """The reason why an image cannot be used, before its name is known."""


@contextlib.contextmanager
def _opened(source: Source, max_pixels: int) -> Iterator[Image.Image]:
    """The image behind `source`, its size checked, its pixels not decoded yet.

    Whatever goes wrong in the body becomes an `ImageError` that names the source.
    """
    name = _name(source)
    try:
        with contextlib.ExitStack() as files:
            image = _open(source, files)
            _check_size(image, max_pixels)
            yield image
            return
    except _UnusableError as error:
        reason = str(error)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"too large even for Pillow: {error}"
    except Image.UnidentifiedImageError:
        reason = f"not an image that can be read (known: {', '.join(_KNOWN_FORMATS)})"
    except Exception as error:  # of damaged files: anything from OSError to IndexError
        reason = f"damaged or unreadable: {error or type(error).__name__}"
    raise ImageError(f"{name}: {reason}")


def _open(source: Source, files: contextlib.ExitStack) -> Image.Image:
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes | FileSlice):
        file = io.BytesIO(source if isinstance(source, bytes) else source.read())
    elif address := remote.address_of(source):
        folder, _, name = address.rpartition("/")
        content = remote.read(folder, name)
        if content is None:
            raise _UnusableError("no such file")
        file = io.BytesIO(content)
    else:
        path = pathlib.Path(source)
        if not path.is_file():  # opening a pipe or a device could wait for ever
            problem = address_problem(source)
            absent = f"it {problem}" if problem else "no such file"
            raise _UnusableError("is not a file" if path.exists() else absent)
        file = files.enter_context(path.open("rb"))
    return files.enter_context(Image.open(file, formats=_KNOWN_FORMATS))


def _reduced(image: Image.Image, factor: int, upright: bool = True) -> Image.Image:
    """The JPEG behind `image`, RGB, turned or not, decoded at one `factor`-th of its sides.

    The pixels are those of Pillow, whose own decoding takes a tenth more time; it is left what is
    not plain: gray and CMYK, and whatever is damaged, so that it decides what can be used.
    """
    if image.mode == "RGB":
        file: Any = image.fp  # pyright: ignore (only opened files have one)
        file.seek(0)
        height, width = -(-image.height // factor), -(-image.width // factor)
        with contextlib.suppress(ValueError):
            pixels = simplejpeg.decode_jpeg(file.read(), min_height=height, min_width=width)
            turn = _UPRIGHT.get(_orientation(image)) if upright else None
            reduced = Image.fromarray(pixels)
            return reduced.transpose(turn) if turn is not None else reduced
    image.draft(None, (image.width // factor, image.height // factor))  # pyright: ignore
    return _rgb(image, upright)


def _reduction(pixels: int, min_pixels: float) -> int:
    """The divisor of a JPEG's sides that leaves at least `min_pixels` of the `pixels`."""
    return next(by for by in (8, 4, 2, 1) if by == 1 or pixels >= min_pixels * by * by)


def _random_box(
    image_width: int,
    image_height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part, by torchvision's rule.

    Ten times a random area and shape are tried; if none fits into the image (it is long and
    thin), the middle is taken, as large as `ratio` allows.
    """
    for _ in range(10):
        area = image_width * image_height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < width <= image_width and 0 < height <= image_height:
            top = int(rng.integers(0, image_height - height + 1))
            left = int(rng.integers(0, image_width - width + 1))
            return left, top, width, height
    shape = min(max(image_width / image_height, ratio[0]), ratio[1])
    width = min(image_width, round(image_height * shape))
    height = min(image_height, round(image_width / shape))
    return (image_width - width) // 2, (image_height - height) // 2, width, height


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise _UnusableError(f"has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise _UnusableError(
            f"{width} x {height} pixels, more than the limit of {max_pixels}: make it smaller, or "
            "raise max_pixels if it can be trusted"
        )


def _rgb(image: Image.Image, upright: bool) -> Image.Image:
    image.load()
    # After load(): the TIFF reader turns the image itself and then forgets the orientation.
    turn = _UPRIGHT.get(_orientation(image)) if upright else None
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "F":
        raise _UnusableError(
            "has floating-point pixels, whose range is not known: convert it to 8 bits"
        )
    image = image.convert("RGB")  # always a copy, so the caller's image stays as it is
    return image.transpose(turn) if turn is not None else image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF is no reason to lose the picture
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 8 bits from 16: Pillow's own conversion clips, everything above 255 becomes white."""
    gray = np.asarray(image)
    low, high = int(gray.min()), int(gray.max())
    if low < 0 or high > 65535:
        raise _UnusableError(f"has 32-bit pixels from {low} to {high}: convert it to 8 bits")
    if 255 < high < 4096:
        raise _UnusableError(
            f"has 16-bit pixels, but none brighter than {high} of 65535 (fewer bits in a 16-bit "
            "file?), and would be all but black: scale it to 8 bits"
        )
    # Nothing above 255 is an 8-bit picture in a wide file, not a black one.
    return Image.fromarray((gray >> 8 if high > 255 else gray).astype(np.uint8))


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise _UnusableError(f"has dtype {array.dtype}, expected uint8 (0 to 255)")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise _UnusableError(f"has shape {array.shape}, expected [H, W], [H, W, 3] or [H, W, 4]")
    return Image.fromarray(array)


def check_images(paths: Iterable[str | os.PathLike]) -> None:
    """Raises an ImageError that names every image file that cannot be used."""
    wrong = []
    for path in paths:
        try:
            decode(path)
        except ImageError as error:
            wrong.append(str(error))
    if wrong:
        raise ImageError("; ".join(wrong))


def _name(source: object) -> str:
    if isinstance(source, np.ndarray):
        return "image array"
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or "PIL image")
    if isinstance(source, FileSlice):
        return str(source)
    if isinstance(source, str | os.PathLike):
        return remote.address_of(source) or os.fspath(source)
    raise ImageError(
        f"an image is given as {type(source).__name__}, expected a path, bytes, a PIL image or a "
        "uint8 array"
    )
