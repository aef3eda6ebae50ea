"""Reads a few frames of a video, with the time of each.

PyAV (FFmpeg) decodes them; `pip install -e .[video]` installs it.
"""

import functools
import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image

from jax_instructblip.data.images import MAX_PIXELS
from jax_instructblip.files import require_file

if TYPE_CHECKING:
    import av

# Only formats that hold a video themselves; playlists could name other files or addresses.
_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,asf,flv,mpeg,mpegts,ogg",
    "protocol_whitelist": "file",
}


VIDEOS_KEPT = 256  # videos whose frames are cached, a fifth of a megabyte each


class VideoError(ValueError):
    """A video cannot be used; the message names the file and the reason."""


@functools.lru_cache(maxsize=VIDEOS_KEPT)
def _kept_frames(
    path: str, wanted: int, quality: int, state: tuple[int, ...]
) -> tuple[tuple[bytes, ...], tuple[float, ...]] | str:
    """Returns (JPEGs of the frames, their seconds), or a text: the reason why there are none.

    `state` (size and time of the file) is part of the cache's key, so that a changed file is
    decoded again.
    """
    try:
        images, times = read_frames(path, wanted)
    except VideoError as error:
        return str(error)
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        encoded.append(buffer.getvalue())
    return tuple(encoded), times


def encode_frames(
    path: str | os.PathLike[str], wanted: int, *, quality: int
) -> tuple[tuple[bytes, ...], tuple[float, ...]]:
    """Returns JPEGs of `wanted` frames, evenly spread over a video, and the seconds of each.

    Seconds count from the first frame. The frames of the last `VIDEOS_KEPT` videos are cached, so
    that a video with many questions is decoded once. `quality` is Pillow's of JPEGs, up to 100.

    Raises:
        VideoError: as `read_frames`.
    """
    frames_or_error = _kept_frames(os.fspath(path), wanted, quality, _state(path))
    if isinstance(frames_or_error, str):
        raise VideoError(frames_or_error)
    return frames_or_error


def _state(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Returns numbers that change with the file (inode, size, time); () where it cannot be opened.

    Raises:
        VideoError: the file is a pipe or a device, so that opening it could block.
    """
    try:
        status = require_file(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        return ()
    except (OSError, ValueError) as error:
        raise VideoError(str(error)) from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def sample_indices(count: int, wanted: int, how: str = "uniform") -> tuple[int, ...]:
    """Returns the indices of `wanted` frames out of `count`, rising, by one of three fixed rules.

    `uniform` takes the first frame of equal segments (as LAVIS does in training, and the paper in
    evaluation), `middle` takes the middle of each segment, `headtail` the first frame, the last one
    and equal steps between them (newer versions of LAVIS). Three of nine frames:

        frame      0  1  2  3  4  5  6  7  8
        uniform    x        x        x
        middle        x        x        x
        headtail   x           x           x

    Raises:
        ValueError: there are fewer frames than wanted, or no rule of that name.
    """
    if not 1 <= wanted <= count:
        raise ValueError(f"{count} frames, but {wanted} are wanted: ask for 1 to {count}")
    if how == "uniform":
        return tuple(index * count // wanted for index in range(wanted))
    if how == "middle":
        return tuple((2 * index + 1) * count // (2 * wanted) for index in range(wanted))
    if how == "headtail":
        step = count // max(1, wanted - 1)
        inner = tuple(index * step for index in range(1, wanted - 1))
        return ((0,) + inner + (count - 1,))[:wanted]
    raise ValueError(f"frames are taken {how!r}, expected 'uniform', 'middle' or 'headtail'")


def read_frames(
    path: str | os.PathLike[str], wanted: int, how: str = "uniform"
) -> tuple[list[Image.Image], tuple[float, ...]]:
    """Returns RGB images of `wanted` frames, chosen by `sample_indices`, and their seconds.

    Seconds count from the first frame of the video (mp4, mkv, webm, avi or gif). Of several video
    streams FFmpeg chooses the best (as decord does, which LAVIS uses). The video is decoded twice,
    once to count its frames, because the number that a container states is not always true.

    Raises:
        VideoError: there is no such file, or it has no video, is damaged, has frames of more than
            `images.MAX_PIXELS` pixels or fewer frames than wanted; or PyAV is not installed.
    """
    _state(path)
    times = [_seconds(path, frame) for frame in _decode(path)]
    try:
        chosen = sample_indices(len(times), wanted, how)
    except ValueError as error:
        raise VideoError(f"{path}: {error}") from error
    images = []
    for number, frame in enumerate(_decode(path)):
        if number in chosen:
            images.append(frame.to_image())
        if number == chosen[-1]:
            break
    return images, tuple(times[number] - times[0] for number in chosen)


def _decode(path: str | os.PathLike[str]) -> Iterator["av.VideoFrame"]:
    """Yields all frames in the order in which they are shown."""
    try:
        import av
        import av.error
    except ImportError as error:
        raise VideoError(f"{path}: videos need PyAV: pip install -e .[video]") from error
    done = 0
    try:
        with av.open(os.fspath(path), options=_OPTIONS) as container:
            best = container.streams.best("video")
            if best is None:
                raise VideoError(f"{path} holds no video")
            stream = next(each for each in container.streams.video if each.index == best.index)
            if stream.width * stream.height > MAX_PIXELS:
                raise VideoError(
                    f"{path}: frames of {stream.width} x {stream.height} pixels, expected at most "
                    f"{MAX_PIXELS}"
                )
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                yield frame
                done += 1
    except av.error.FFmpegError as error:
        hint = "" if isinstance(error, OSError) else "; it may have been cut off, get it again"
        raise VideoError(
            f"{path} cannot be read after {done} frames: {error.strerror}{hint}"
        ) from error


def _seconds(path: str | os.PathLike[str], frame: "av.VideoFrame") -> float:
    if frame.time is None:
        raise VideoError(f"{path}: a frame has no time: write the video anew, as mp4")
    return frame.time
