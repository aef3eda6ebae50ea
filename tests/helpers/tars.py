"""Tars as img2dataset writes them: images, captions and metadata of one key beside each other."""

import io
import json
import pathlib
import tarfile
from collections.abc import Iterable

import numpy as np
from PIL import Image


def picture(number: int, kind: str = "JPEG") -> bytes:
    """8 x 8 pixels that follow from the number, as the bytes of an image file."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def entry(key: str, caption: object, number: int = 0, **files: bytes) -> list[tuple[str, bytes]]:
    """The members of one entry; `files` replace or add members by their endings."""
    meta = {"caption": caption, "key": key, "url": "http://a.b/c.jpg", "similarity": float("nan")}
    members = {"jpg": picture(number), "json": json.dumps(meta, indent=4).encode()}
    members["txt"] = b"" if caption is None else str(caption).encode()
    return [(f"{key}.{ending}", content) for ending, content in (members | files).items()]


def write_tar(path: pathlib.Path, members: Iterable[tuple[str, bytes]]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: pathlib.Path, sizes: Iterable[int]) -> pathlib.Path:
    """`00000.tar` with so many entries and its `00000_stats.json`, and so on."""
    for shard, size in enumerate(sizes):
        members = []
        for number in range(size):
            key = f"{shard:05d}{number:04d}"
            members += entry(key, f"dog {number} of {shard}", 100 * shard + number)
        write_tar(folder / f"{shard:05d}.tar", members)
        stats = {"count": size + 3, "successes": size, "failed_to_download": 3}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return folder
