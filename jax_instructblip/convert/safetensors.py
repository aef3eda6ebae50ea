"""Safetensors files, read by seek and written by seek: one tensor in memory at a time.

    8 bytes  length of the header, little-endian
    header   JSON: {"name": {"dtype": "BF16", "shape": [...], "data_offsets": [begin, end]}, ...}
    data     the tensors; offsets count from here, without holes

The usual library maps whole files, and mapped pages count as resident memory; this one never does.
Everything a header or an index claims is checked before a tensor is read.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_instructblip.files import parse_json, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_LIMIT = 100 * 2**20  # bytes; the format's own limit
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ConversionError(ValueError):
    """A folder that cannot be converted; `failures` holds every reason, the message lists them."""

    def __init__(self, title: str, failures: list[str]):
        """Joins the failures below the title, one a line."""
        self.failures = failures
        super().__init__("\n  ".join([f"{title} ({len(failures)}):", *failures]))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: nothing is read before `read`."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, part: int = 0, parts: int = 1) -> np.ndarray:
        """The tensor, or one of `parts` equal pieces along its first axis, in memory of its own."""
        shape = self.shape if parts == 1 else (self.shape[0] // parts, *self.shape[1:])
        array = np.empty(shape, self.dtype)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + part * array.nbytes)
            view = array.reshape(-1).view(np.uint8).data
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError(f"{self.file} ended while a tensor was read: was it changed?")
                view = view[count:]
        return array


def open_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`, or of the shards that its index names, by key.

    Raises ConversionError with everything that is wrong with the files: missing or truncated
    shards, offsets that overlap or leave holes, keys that index and shards do not agree on.
    """
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    if not (folder / SINGLE).is_file():
        there = (
            sorted(path.name for path in folder.iterdir())[:12] if folder.is_dir() else "no folder"
        )
        raise ConversionError(
            f"{folder} holds no weights",
            [f"neither {SINGLE} nor {INDEX} is there (only safetensors are read); found: {there}"],
        )
    tensors, failures = _open_file(folder / SINGLE)
    if failures:
        raise ConversionError(f"{folder / SINGLE} is damaged", failures)
    return tensors


def _open_shards(folder: Path) -> dict[str, Tensor]:
    try:
        index = read_json(folder / INDEX, dict)["weight_map"]
        shards = sorted(set(index.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{folder / INDEX} is damaged", [f"no readable weight_map: {error!r}"]
        ) from error
    tensors: dict[str, Tensor] = {}
    failures: list[str] = []
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            keys = [key for key, name in index.items() if name == shard]
            failures.append(
                f"{shard}: the index names this shard, but there is no such file "
                f"({len(keys)} tensors, the first is {keys[0]})"
            )
            continue
        found, wrong = _open_file(folder / shard)
        failures += wrong
        if wrong:
            continue
        for key in found.keys() - index.keys():
            failures.append(f"{shard}: holds {key}, which the index does not name")
        for key, name in index.items():
            if name == shard and key not in found:
                failures.append(f"{shard}: the index promises {key}, the file does not hold it")
            elif name != shard and key in found:
                failures.append(f"{shard}: holds {key}, which the index places in {name}")
        tensors |= found
    for path in sorted(folder.glob("model*.safetensors")):
        if path.name not in shards:
            failures.append(f"{path.name}: the index does not name this file")
    if failures:
        raise ConversionError(f"the weight files of {folder} do not fit together", sorted(failures))
    return tensors


def _open_file(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of one file, and what is wrong with it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
            return {}, [
                f"{path.name}: no safetensors header ({size} bytes): truncated, or no such file"
            ]
        raw = file.read(length)
    try:
        header = dict(parse_json(raw))
        header.pop("__metadata__", None)
        entries = {
            key: (str(e["dtype"]), tuple(map(int, e["shape"])), *map(int, e["data_offsets"]))
            for key, e in header.items()
        }
    except (ValueError, KeyError, TypeError) as error:
        return {}, [f"{path.name}: the header cannot be read: {error!r}"]
    tensors: dict[str, Tensor] = {}
    failures: list[str] = []
    at = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if len(entry) != 4 or entry[0] not in DTYPES or min(entry[1], default=0) < 0:
            failures.append(f"{path.name}: {key}: entry {header[key]} cannot be read here")
            continue
        name, shape, begin, end = entry
        tensor = Tensor(path, DTYPES[name], shape, 8 + length + begin)
        if end - begin != tensor.nbytes:
            failures.append(
                f"{path.name}: {key}: {list(shape)} {name} takes {tensor.nbytes} bytes, "
                f"its offsets [{begin}, {end}] hold {end - begin}"
            )
        elif begin != at:
            what = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            failures.append(f"{path.name}: {key}: begins at {begin}, expected {at}: {what}")
        at = end
        tensors[key] = tensor
    expected = 8 + length + at
    if size != expected:
        what = "truncated" if size < expected else "bytes left over"
        failures.append(f"{path.name}: {size} bytes, its header describes {expected}: {what}")
    return tensors, failures


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Size and header sha256 of each file: where the weights came from, without reading them."""
    found = {}
    for path in sorted({tensor.file for tensor in tensors.values()}):
        with path.open("rb") as file:
            first = file.read(8)
            header = first + file.read(int.from_bytes(first, "little"))
        found[path.name] = {
            "bytes": path.stat().st_size,
            "header_sha256": hashlib.sha256(header).hexdigest(),
        }
    return found


class Writer:
    """Writes tensors in any order to shards whose layout is fixed beforehand.

    Shards are filled in the order of `specs`; a tensor above `shard_bytes` gets one of its own.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]], shard_bytes: int
    ):
        """Writes the headers and, where there is more than one shard, the index."""
        self._left = set(specs)
        self._places: dict[str, Tensor] = {}
        shards = list(_shards(specs, shard_bytes))
        index = {}
        for number, keys in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else SINGLE
            self._layout(folder / name, {key: specs[key] for key in keys})
            index |= dict.fromkeys(keys, name)
        self.total_bytes = sum(place.nbytes for place in self._places.values())
        if shards[1:]:
            document = {"metadata": {"total_size": self.total_bytes}, "weight_map": index}
            (folder / INDEX).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")

    def _layout(self, path: Path, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        # Wide dtypes first, so that every tensor is aligned to its own width.
        order = sorted(specs, key=lambda key: (-specs[key][0].itemsize, key))
        at = 0
        for key in order:
            dtype, shape = specs[key]
            end = at + math.prod(shape) * dtype.itemsize
            header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + at)
        for key in order:
            dtype, shape = specs[key]
            begin = header[key]["data_offsets"][0]
            self._places[key] = Tensor(path, dtype, shape, 8 + len(raw) + begin)

    def write(self, key: str, array: np.ndarray) -> None:
        """Puts a tensor into its place; a second one of that key or another shape is an error."""
        place = self._places[key]
        if key not in self._left or array.shape != place.shape or array.dtype != place.dtype:
            raise ValueError(
                f"{key}: {array.shape} {array.dtype} for the place of {place.shape} {place.dtype}, "
                f"{'free' if key in self._left else 'taken'}"
            )
        self._left.remove(key)
        with place.file.open("r+b") as file:
            file.seek(place.offset)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Raises when a tensor was never written: its place would hold zeros."""
        if self._left:
            raise ValueError(f"never written: {', '.join(sorted(self._left))}")


def _shards(
    specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]], limit: int
) -> Iterator[list[str]]:
    keys: list[str] = []
    size = 0
    for key, (dtype, shape) in specs.items():
        bytes_ = math.prod(shape) * dtype.itemsize
        if keys and size + bytes_ > limit:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += bytes_
    yield keys
