"""Reads and checks the images of a record before it is stored."""

import dataclasses
import pathlib

from jax_instructblip.data.images import ImageError, decode
from jax_instructblip.data.records import Record, RecordError
from jax_instructblip.data.video import encode_frames
from jax_instructblip.files import FileSlice, require_file

JPEG_QUALITY = 95  # of the frames of a video


def with_content(record: Record, frames: int = 0) -> Record:
    """Returns the record with the content of its images in place of their paths.

    With `frames` 0 these are the bytes of its image files, each decoded once as a check. Else the
    record is one of a video, and gets JPEGs of `frames` of its frames and their seconds.

    Raises:
        RecordError: the record has a `problem`, or a text cannot be written.
        ImageError: an image is missing, damaged, or of no known kind.
        VideoError: the file is missing, damaged, too short, or has no video.
    """
    if problems := record.text_problems():
        raise RecordError("; ".join(problems), [])
    return with_frames(record, frames) if frames else with_pixels(record)


def with_pixels(record: Record) -> Record:
    """Returns the record with the bytes of its image files in place of their paths.

    Each image is decoded once as a check; images in memory stay as they are.

    Raises:
        ImageError: an image is missing, damaged, or of no known kind.
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
        decode(image if isinstance(image, FileSlice) else content)  # its error names the member
        images.append(content)
    return dataclasses.replace(record, images=tuple(images))


def with_frames(record: Record, frames: int) -> Record:
    """Returns the record of a video with JPEGs of `frames` of its frames, and their seconds.

    Raises:
        VideoError: the file is missing, damaged, too short, or has no video.
    """
    images, times = encode_frames(str(record.images[0]), frames, quality=JPEG_QUALITY)
    return dataclasses.replace(record, images=images, times=times)
