"""Leaves (arrays) in parts: each process of a run writes only the parts that its devices hold.

    params/state/llm.head.kernel/0.0, 0.512     the raw bytes of a part, named by its start index
    manifest.json   {"llm/head/kernel": {"shape": [64, 1024], "dtype": "float32", "parts":
                       {"0.0": {"shape": [64, 512], "sha256": "..."}, "0.512": {...}}}, ...}

If several devices hold the same part, the process of the first one (`replica_id` 0) writes it.
These files are all that is needed to read the leaves, on any number of processes.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_instructblip.checkpoint.manifest import CheckpointError, dtype_of, listed
from jax_instructblip.checkpoint.stored_leaf import StoredLeaf, StoredPart, StoredParts

Manifest = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class OwnPart:
    """A part of a leaf that this process writes.

    Attributes:
      path: the path of the leaf.
      start: the index in the leaf at which the part begins, one number per axis.
      data: the part as an array, on a device or not.
    """

    path: str
    start: tuple[int, ...]
    data: Any

    @property
    def name(self) -> str:
        """The name of the part's file."""
        return name_of(self.start)


def name_of(start: Iterable[int]) -> str:
    """The name of the part that starts at an index, such as `0.512`; `0` for a scalar leaf."""
    return ".".join(map(str, start)) or "0"


def own_parts(leaves: Mapping[str, jax.Array]) -> Iterator[OwnPart]:
    """Yields the parts that this process writes, as they are on its devices.

    `leaves` maps path to the global array. A leaf that every process has whole, such as a random
    key, is written by process 0.
    """
    for path, leaf in leaves.items():
        if leaf.is_fully_addressable and jax.process_index() > 0:
            continue
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                start = tuple(axis.start or 0 for axis in shard.index)
                yield OwnPart(path, start, shard.data)


def write_parts(params: Path, parts: Iterable[OwnPart]) -> Manifest:
    """Writes parts of leaves below `params`; returns a manifest that lists these parts only.

    `params` is the folder of that name in a checkpoint folder.
    """
    manifest: Manifest = {}
    for part in parts:
        array = np.ascontiguousarray(part.data).reshape(np.shape(part.data))
        raw = array.reshape(-1).view(np.uint8).data
        folder = params / "state" / part.path.replace("/", ".")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / part.name).open("xb") as file:
            file.write(raw)
        entry = manifest.setdefault(part.path, {"dtype": array.dtype.name, "parts": {}})
        entry["parts"][part.name] = {
            "shape": list(array.shape),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
    return manifest


def merge(manifests: Iterable[Manifest], shapes: Mapping[str, tuple[int, ...]]) -> Manifest:
    """Merges the manifests of several processes to one; `shapes` are those of the whole leaves.

    Raises:
        CheckpointError: parts are missing; names all such leaves.
    """
    merged: Manifest = {path: {"shape": list(shape)} for path, shape in shapes.items()}
    for manifest in manifests:
        for path, entry in manifest.items():
            merged[path].setdefault("parts", {}).update(entry["parts"])
            merged[path]["dtype"] = entry["dtype"]
    check_parts(merged, "what the processes have written")
    return merged


def is_in_parts(manifest: Mapping[str, Mapping[str, Any]]) -> bool:
    """True if a manifest lists leaves in parts, False if it lists whole leaves."""
    return any("parts" in entry for entry in manifest.values())


def check_parts(manifest: Mapping[str, Mapping[str, Any]], where: Any) -> None:
    """Raises a CheckpointError that names all leaves which their parts do not cover exactly once.

    The message begins with `where`, for example the checkpoint folder.
    """
    wrong = []
    for path, entry in manifest.items():
        problem = _problem(entry.get("shape"), entry.get("parts", {}))
        if problem:
            wrong.append(f"{path}: {problem}")
    if wrong:
        raise CheckpointError(listed(f"{where}: the parts do not make up the leaves", wrong))


def _problem(shape: Any, parts: Any) -> str:
    """The reason why these parts do not cover a leaf of that shape exactly once; "" if they do."""
    try:
        boxes = []
        for name, part in parts.items():
            start = [int(word) for word in name.split(".")][: len(shape)]
            if name_of(start) != name or len(part["shape"]) != len(shape):
                return f"part {name} has the shape {part['shape']}"
            if min(start, default=0) < 0 or not isinstance(part["sha256"], str):
                return f"part {name} is before the leaf begins, or has no sha256"
            ends = [first + size for first, size in zip(start, part["shape"], strict=True)]
            if any(end > size for end, size in zip(ends, shape, strict=True)):
                return f"part {name} ends at {ends}, the leaf at {shape}"
            boxes.append((start, ends))
        covered = sum(math.prod(part["shape"]) for part in parts.values())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"not understood: {error}"
    if covered != math.prod(shape):
        return f"they have {covered} numbers, the leaf {math.prod(shape)}"
    for (begins, ends), (others, limits) in itertools.combinations(boxes, 2):
        both = zip(begins, ends, others, limits, strict=True)
        if all(max(one, other) < min(end, limit) for one, end, other, limit in both):
            return f"parts overlap at {others}"
    return ""


def stored(params: Path, path: str, entry: Mapping[str, Any]) -> StoredParts:
    """The leaf at `path`, which is in parts, as an array that is read when it is sliced.

    `params` is the folder of that name in a checkpoint folder, `entry` the leaf's in its manifest.

    Raises:
        OSError: a file is missing.
        ValueError: a file has the wrong length.
    """
    folder = params / "state" / path.replace("/", ".")
    parts = [
        StoredPart(folder / name, tuple(map(int, name.split("."))), tuple(part["shape"]))
        for name, part in entry["parts"].items()
    ]
    return StoredParts(parts, tuple(entry["shape"]), dtype_of(entry))


def files(params: Path, manifest: Mapping[str, Mapping[str, Any]]) -> dict[Path, tuple[str, str]]:
    """Maps every file that holds bytes of leaves to (leaf path, sha256 of the file)."""
    hashes = {}
    for path, entry in manifest.items():
        folder = params / "state" / path.replace("/", ".")
        if "parts" in entry:
            for name, part in entry["parts"].items():
                hashes[folder / name] = path, part["sha256"]
        else:
            chunk = ".".join("0" * max(len(entry["shape"]), 1))  # a whole leaf is one Zarr chunk
            hashes[folder / chunk] = path, entry["sha256"]
    return hashes


def stored_leaf(params: Path, path: str, entry: Mapping[str, Any]) -> StoredParts:
    """The leaf at `path`, whole or in parts, as an array that is read when it is sliced.

    The arguments are those of `stored`.

    Raises:
        OSError: a file is missing.
        ValueError: a file has the wrong length.
    """
    if "parts" in entry:
        return stored(params, path, entry)
    return StoredLeaf(next(iter(files(params, {path: entry}))), entry["shape"], dtype_of(entry))
