"""The content of a record's images, read and checked before it is stored."""

import dataclasses
import pathlib

from jax_instructblip.data.images import ImageError, decode
from jax_instructblip.data.records import Record, RecordError
from jax_instructblip.data.video import encode_frames
from jax_instructblip.files import FileSlice, require_file

JPEG_QUALITY = 95  # of the frames of a video


def with_content(record: Record, frames: int = 0) -> Record:
    """The record with the bytes of its images, or of `frames` frames where it is of a video.

    Raises:
        RecordError: its reader found no usable record, or a text cannot be written.
        ImageError: an image that is missing, damaged, or of no known kind.
        VideoError: a file that is missing, damaged, too short, or holds no video.
    """
    if problems := record.text_problems():
        raise RecordError("; ".join(problems), [])
    return with_frames(record, frames) if frames else with_pixels(record)


def with_pixels(record: Record) -> Record:
    """The record with the encoded bytes of its images, each decoded once to see that it can be.

    Raises:
        ImageError: an image that is missing, damaged, or of no known kind.
    """
    images = []
    for image in record.images:
        content = image
        try:
            if isinstance(image, str):
                require_file(image)  # reading a pipe could wait for ever
                content = pathlib.Path(image).read_bytes()
            elif isinstance(image, FileSlice):
                content = image.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ImageError(f"{pathlib.Path(str(image)).name}: {reason}") from error
        decode(image if isinstance(image, FileSlice) else content)  # a member is called by name
        images.append(content)
    return dataclasses.replace(record, images=tuple(images))


def with_frames(record: Record, frames: int) -> Record:
    """The record of a video with JPEGs of `frames` of its frames, and their seconds.

    Raises:
        VideoError: a file that is missing, damaged, too short, or holds no video.
    """
    images, times = encode_frames(str(record.images[0]), frames, quality=JPEG_QUALITY)
    return dataclasses.replace(record, images=images, times=times)
