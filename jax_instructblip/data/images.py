"""Turns an image file into uint8 pixels: decode, then resize, or crop and flip at random.

Pillow resizes and crops one image at a time, so that pixels are bit-equal to those of LAVIS, the
code that was released with the paper. Pixels are normalised with CLIP's mean and deviation later,
on the device.
"""

import contextlib
import hashlib
import io
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from jax_instructblip import remote
from jax_instructblip.files import FileSlice, address_problem
from jax_instructblip.models.variants import IMAGE_MEAN

# Pillow warns above this size, too; decoding would take more than 250 MB.
MAX_PIXELS = 89_478_485

PADDING = tuple(int(255 * value) for value in IMAGE_MEAN)  # RGB around a padded image

# Formats that run other programs (EPS), are containers, or hold no photographs are left out.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()
_KNOWN_FORMATS = tuple(name for name in _FORMATS if name in Image.OPEN)

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations of pictures whose width and height are exchanged

# EXIF orientation -> transpose that makes the picture upright (1 is upright already).
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
    """Returns an RGB image of 8 bits a channel.

    `source` is a path, an address of an object store (`gs://...`), a member of a tar, the bytes of
    an image file, a PIL image or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].

    - `upright` applies the EXIF orientation (LAVIS does not apply it).
    - Of an animation the first frame is taken.
    - Transparency is dropped, not blended (Pillow's `convert("RGB")`, as in LAVIS).
    - 16-bit gray keeps its high byte, as Pillow does for 16-bit colour.
    - An image of more than `max_pixels` pixels is refused before any pixel is decoded.

    Raises:
        ImageError: the image cannot be used; the message has its name and the reason.
    """
    with _opened(source, max_pixels) as image:
        return _rgb(image, upright)


def content_digest(source: Source) -> bytes:
    """Returns 16 bytes that stand for an image: a hash of its file, or of pixels in memory.

    Equal files have one digest wherever they lie. Nothing is decoded.

    Raises:
        ImageError: the file cannot be read; the message has its name and the reason.
    """
    with _named_errors(source), contextlib.ExitStack() as files:
        if isinstance(source, np.ndarray):
            parts = [repr((source.shape, source.dtype.str)).encode(), source.tobytes()]
        elif isinstance(source, Image.Image):
            facts = repr((source.mode, source.size, _orientation(source)))
            palette = source.getpalette("RGBA") if source.mode.startswith("P") else None
            parts = [facts.encode(), repr(palette).encode(), source.tobytes()]
        else:
            parts = [_file(source, files).read()]
        return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def resize_squash(image: Image.Image, size: int) -> np.ndarray:
    """Returns pixels [size, size, 3] uint8 of the whole image, its aspect ratio not kept.

    Bicubic with antialiasing, bit-equal to `blip_image_eval` of LAVIS.
    """
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def resize_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Returns pixels [size, size, 3] uint8 of the middle square of the image.

    The shorter side is scaled to `size` first. Bicubic with antialiasing, as `clip_image_eval` of
    LAVIS.
    """
    return _center_crop(image, size, round)


def resize_clip_crop(image: Image.Image, size: int) -> np.ndarray:
    """Returns pixels [size, size, 3] uint8 of the middle square, as transformers prepares CLIP's.

    It is up to one pixel further to the left or top than that of `resize_center_crop`, where the
    margins are odd. LLaVA v1 prepares images so.
    """
    return _center_crop(image, size, math.floor)


def resize_padded(image: Image.Image, size: int) -> np.ndarray:
    """Returns pixels [size, size, 3] uint8 of the whole image in the middle of a square.

    The square around it has the mean color of CLIP's images. Bicubic with antialiasing, as LLaVA
    v1.5 prepares images.
    """
    side = max(image.size)
    square = Image.new("RGB", (side, side), PADDING)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return resize_squash(square, size)


def _center_crop(image: Image.Image, size: int, to_whole: Callable[[float], int]) -> np.ndarray:
    """Scales the shorter side to `size` and crops; `to_whole` rounds the left and top margins."""
    short = min(image.size)
    width, height = (size * each // short for each in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = to_whole((width - size) / 2), to_whole((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


# The ways to prepare an image without chance, by the name that settings use.
CROPS = {
    "squash": resize_squash,
    "center": resize_center_crop,
    "clip": resize_clip_crop,
    "pad": resize_padded,
}


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
    """Returns pixels [size, size, 3] uint8 of a random part of the image, mirrored at random.

    This is `blip2_image_train` of LAVIS: torchvision's RandomResizedCrop, bicubic, and
    RandomHorizontalFlip with probability 0.5. `scale` bounds the part's share of the area, `ratio`
    its width / height.

    `min_ratio` makes large JPEGs faster: a file is decoded at a half, a quarter or an eighth of its
    sides as long as the part still has `min_ratio` times size x size pixels; 0 or inf turns this
    off. The part is the same, but its pixels differ a little, because the decoder averages blocks
    (and with `min_ratio` below 1 the part may be enlarged again). `source`, `max_pixels`, `upright`
    and errors are as in `decode`.
    """
    with _opened(source, max_pixels) as image:
        # A JPEG's header has the size that the crop needs. (A TIFF may turn while it is decoded.)
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
    across, down = image.width / width, image.height / height  # below 1 if reduced
    left, top = round(box[0] * across), round(box[1] * down)
    right, bottom = round((box[0] + box[2]) * across), round((box[1] + box[3]) * down)
    # Crop first: resize(box=...) would blend in pixels outside of the box.
    part = image.crop((left, top, right, bottom))
    part = part.resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part)


class _UnusableError(Exception):
    """The reason why an image cannot be used; `_opened` turns it into an `ImageError`."""


@contextlib.contextmanager
def _opened(source: Source, max_pixels: int) -> Iterator[Image.Image]:
    """Opens `source` and checks its size; its pixels are not decoded yet.

    Any error in the body of the `with` statement becomes an `ImageError` that names the source.
    """
    with _named_errors(source), contextlib.ExitStack() as files:
        image = _open(source, files)
        _check_size(image, max_pixels)
        yield image


@contextlib.contextmanager
def _named_errors(source: Source) -> Iterator[None]:
    """Turns any error in the body of the `with` into an `ImageError` that names `source`."""
    name = _name(source)
    try:
        yield
        return
    except _UnusableError as error:
        reason = str(error)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"too large even for Pillow: {error}"
    except Image.UnidentifiedImageError:
        reason = f"not an image that can be read (known: {', '.join(_KNOWN_FORMATS)})"
    except Exception as error:  # damaged files raise anything from OSError to IndexError
        reason = f"damaged or unreadable: {error or type(error).__name__}"
    raise ImageError(f"{name}: {reason}")


def _open(source: Source, files: contextlib.ExitStack) -> Image.Image:
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return source
    return files.enter_context(Image.open(_file(source, files), formats=_KNOWN_FORMATS))


def _file(
    source: str | os.PathLike[str] | bytes | FileSlice, files: contextlib.ExitStack
) -> BinaryIO:
    """Returns the open file of an image that is not in memory as pixels."""
    if isinstance(source, bytes | FileSlice):
        return io.BytesIO(source if isinstance(source, bytes) else source.read())
    if address := remote.address_of(source):
        folder, _, name = address.rpartition("/")
        content = remote.read(folder, name)
        if content is None:
            raise _UnusableError("no such file")
        return io.BytesIO(content)
    path = pathlib.Path(source)
    if not path.is_file():  # opening a pipe or a device could wait for ever
        problem = address_problem(source)
        absent = f"it {problem}" if problem else "no such file"
        raise _UnusableError("is not a file" if path.exists() else absent)
    return files.enter_context(path.open("rb"))


def _reduced(image: Image.Image, factor: int, upright: bool = True) -> Image.Image:
    """Returns the opened JPEG as RGB, decoded at 1 / `factor` of its sides.

    simplejpeg decodes plain RGB files to the same pixels as Pillow, in a tenth less time. Gray,
    CMYK and damaged files go to Pillow, so that the same files are refused everywhere. `upright`
    applies the EXIF orientation.
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
    """Returns 8, 4, 2 or 1: the largest divisor of an image's sides that keeps enough pixels.

    `pixels` is the number before the division, `min_pixels` the number that must remain.
    """
    return next(by for by in (8, 4, 2, 1) if by == 1 or pixels >= min_pixels * by * by)


def _random_box(
    image_width: int,
    image_height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Returns left, top, width and height of a random part of the image, by torchvision's rule.

    Ten random areas and shapes are tried. If none fits into the image (it is long and thin), the
    part is the middle of the image, as large as `ratio` allows.
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
    """Returns 8-bit gray of a 16-bit image.

    Pillow's own conversion clips instead: everything above 255 becomes white.
    """
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
    """Raises one ImageError that names every image file that cannot be used."""
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
