"""Opens the weights of a folder: safetensors, or else the `pytorch_model*.bin` of PyTorch."""

import re
from pathlib import Path
from typing import Any

from jax_instructblip.conversion.safetensors import (
    INDEX,
    SINGLE,
    ConversionError,
    fingerprint,
    open_folder,
    read_index,
)
from jax_instructblip.conversion.torch_files import merge_files, open_pth

BIN, BIN_INDEX = "pytorch_model*.bin", "pytorch_model.bin.index.json"
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.bin$")


def has_weights(folder: Path) -> bool:
    """Tells whether a folder has files of a whole model's weights, perhaps damaged ones."""
    names = (SINGLE, INDEX, BIN_INDEX)
    return any((folder / name).is_file() for name in names) or any(folder.glob(BIN))


def open_weights(folder: Path) -> dict[str, Any]:
    """Returns the tensors of a folder by name, a `Tensor` or `TorchTensor` each; none is read.

    Raises:
      ConversionError: there are none, or files are missing, damaged or of two models.
    """
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return dict(open_folder(folder))
    paths = sorted(folder.glob(BIN))
    present = {path.name for path in paths}
    if (folder / BIN_INDEX).is_file():
        names = set(read_index(folder / BIN_INDEX).values())
        if lacking := sorted(names - present):
            raise ConversionError(f"{folder} lacks files of its index", lacking)
        if surplus := sorted(present - names):
            raise ConversionError(
                f"{folder} has weights of two models: remove these or {BIN_INDEX}, which does not "
                "name them",
                surplus,
            )
    elif lacking := _lacking_shards(present):
        raise ConversionError(f"{folder} lacks shards of its weights", lacking)
    if not paths:
        raise ConversionError(
            f"{folder} holds no weights", [f"expected {SINGLE}, {INDEX} or {BIN}"]
        )
    return merge_files(map(open_pth, paths))


def _lacking_shards(names: set[str]) -> list[str]:
    """Returns the shards that are missing by the numbers in the names of the others."""
    lacking = set()
    for name in names:
        if found := _SHARD.search(name):
            width, count = len(found[1]), int(found[2])
            start = name[: found.start()]
            lacking |= {f"{start}-{n:0{width}}-of-{found[2]}.bin" for n in range(1, count + 1)}
    return sorted(lacking - names)


def describe_files(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {file name: {"bytes": ...}} of the files of these tensors, as a record of the source.

    Of safetensors it has `header_sha256`, too. The weights themselves are not read.
    """
    safe = {n: each for n, each in tensors.items() if each.file.suffix == ".safetensors"}
    others = sorted({each.file for each in tensors.values()} - {e.file for e in safe.values()})
    return fingerprint(safe) | {path.name: {"bytes": path.stat().st_size} for path in others}
