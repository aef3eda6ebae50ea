"""Reads and writes safetensors files by seek, with one tensor in memory at a time.

    8 bytes  length of the header, little-endian
    header   JSON: {"name": {"dtype": "BF16", "shape": [...], "data_offsets": [begin, end]}, ...}
    data     the tensors without gaps; offsets count from the start of this part

The usual library maps whole files into memory, and mapped pages count as resident memory. All that
a header or an index states is checked before a tensor is read.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_instructblip.atomic import free_bytes
from jax_instructblip.fields import check, whole
from jax_instructblip.files import kind_of, parse_json, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_AXES = 8
LONGEST_NAME = 255  # bytes of a file's name
LARGEST = 2**63  # bytes or elements
HEADER_LIMIT = 100 * 2**20  # bytes; the format's own limit
SHARD_BYTES = 5_000_000_000  # default size of the largest shard
SHARD_SIZE = whole(1, 2**50, unit="bytes")  # what `shard_bytes` may be
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
# Dtypes of the format that this package does not read, with their bits.
QUANTISED = {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
QUANTISED |= {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
OTHERS = {"U16": 16, "U32": 32, "U64": 64, "C64": 64}
BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | QUANTISED | OTHERS
DEQUANTISE = (
    "take the release in bfloat16, float16 or float32, or load the folder in transformers, call "
    "model.dequantize() and save it again"
)


class ConversionError(ValueError):
    """A folder cannot be converted; `failures` holds every reason, and the message lists them."""

    def __init__(self, title: str, failures: list[str]):
        """Joins the failures below the title, one a line."""
        self.failures = failures
        super().__init__("\n  ".join([f"{title} ({len(failures)}):", *failures]))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The place of one tensor in its file; only `read` reads its data."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, part: int = 0, parts: int = 1) -> np.ndarray:
        """Returns a new array: the tensor, or piece `part` (from 0) of `parts` along axis 0.

        The length of axis 0 must be a multiple of `parts`.
        """
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
    """Returns the tensors of `model.safetensors`, or of the shards in its index, by name.

    Only headers are read.

    Raises:
        ConversionError: shards are missing or truncated, offsets overlap or leave gaps, or index
            and shards do not agree; all failures are listed.
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
    tensors, unread, failures = _open_file(folder / SINGLE)
    if failures:
        raise ConversionError(f"{folder / SINGLE} is damaged", failures)
    _refuse_unread(folder, unread)
    return tensors


def _open_shards(folder: Path) -> dict[str, Tensor]:
    index = read_index(folder / INDEX)
    tensors: dict[str, Tensor] = {}
    unread: dict[str, str] = {}
    failures: list[str] = []
    shards = sorted(set(index.values()))
    for shard in shards:
        is_name = (
            Path(shard).name == shard != ".."
            and len(shard.encode("utf-8", "replace")) <= LONGEST_NAME
        )
        if not is_name or not (folder / shard).is_file():
            keys = [key for key, name in index.items() if name == shard]
            what = "there is no such file" if is_name else "it is no name of a file beside it"
            failures.append(
                f"{shard:.{LONGEST_NAME}}: the index names this shard, but {what} "
                f"({len(keys)} tensors, the first is {keys[0]})"
            )
            continue
        opened, others, wrong = _open_file(folder / shard)
        failures += wrong
        if wrong:
            continue
        keys = opened.keys() | others.keys()
        for key in keys - index.keys():
            failures.append(f"{shard}: holds {key}, which the index does not name")
        for key, name in index.items():
            if name == shard and key not in keys:
                failures.append(f"{shard}: the index promises {key}, the file does not hold it")
            elif name != shard and key in keys:
                failures.append(f"{shard}: holds {key}, which the index places in {name}")
        tensors |= opened
        unread |= others
    for path in sorted(folder.glob("model*.safetensors")):
        if path.name not in shards:
            failures.append(f"{path.name}: the index does not name this file")
    if failures:
        raise ConversionError(f"the weight files of {folder} do not fit together", sorted(failures))
    _refuse_unread(folder, unread)
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """Returns the name of the file that holds each tensor, by tensor, from the index at `path`."""
    title = f"{path} is damaged"
    try:
        index = read_json(path, dict).get("weight_map")
    except ValueError as error:
        raise ConversionError(title, [str(error)]) from error
    if not isinstance(index, dict) or not index:
        raise ConversionError(
            title,
            [f"no readable weight_map: found {kind_of(index)}, expected file names by tensor"],
        )
    wrong = [key for key, name in index.items() if not isinstance(name, str) or not name]
    if wrong:
        raise ConversionError(
            title,
            [
                f"{len(wrong)} tensors have no file name; the first is {wrong[0]}: found "
                f"{kind_of(index[wrong[0]])}"
            ],
        )
    return index


def _refuse_unread(folder: Path, unread: Mapping[str, str]) -> None:
    """Raises a ConversionError if there are tensors of dtypes that are not supported.

    `unread` has the dtype of each, by name.
    """
    lines = []
    for dtype in sorted(set(unread.values())):
        keys = [key for key, name in unread.items() if name == dtype]
        hint = f"quantised weights: {DEQUANTISE}" if dtype in QUANTISED else "no weights of a model"
        lines.append(f"{len(keys)} tensors are {dtype}, the first is {keys[0]}: {hint}")
    if lines:
        raise ConversionError(f"{folder} holds weights of a dtype that is not read", lines)


def _open_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Returns the tensors of a file, those of unsupported dtypes (name -> dtype), and failures."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
            reason = f"no safetensors header ({size} bytes): truncated, or no such file"
            return {}, {}, [f"{path.name}: {reason}"]
        raw = file.read(length)
    try:
        header = parse_json(raw)
        if not isinstance(header, dict):
            raise ValueError(f"found {kind_of(header)}, expected an object")
    except ValueError as error:
        return {}, {}, [f"{path.name}: the header cannot be read: {error}"]
    metadata = header.pop("__metadata__", {})
    failures = [
        f"{path.name}: {key}: {reason}" for key, e in header.items() if (reason := _wrong_entry(e))
    ]
    if not isinstance(metadata, dict):
        failures.append(f"{path.name}: __metadata__ is {kind_of(metadata)}, expected an object")
    sound = {key: entry for key, entry in header.items() if not _wrong_entry(entry)}
    tensors: dict[str, Tensor] = {}
    unread: dict[str, str] = {}
    at = 0
    for key, entry in sorted(sound.items(), key=lambda item: item[1]["data_offsets"]):
        name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        needed = -(-math.prod(shape) * BITS[name] // 8)
        if end - begin != needed:
            failures.append(
                f"{path.name}: {key}: {list(shape)} {name} takes {needed} bytes, "
                f"its offsets [{begin}, {end}] hold {end - begin}"
            )
        elif begin != at:
            what = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            failures.append(f"{path.name}: {key}: begins at {begin}, expected {at}: {what}")
        at = end
        if name in DTYPES:
            tensors[key] = Tensor(path, DTYPES[name], shape, 8 + length + begin)
        else:
            unread[key] = name
    expected = 8 + length + at
    if size != expected:
        what = "truncated" if size < expected else "bytes left over"
        failures.append(f"{path.name}: {size} bytes, its header describes {expected}: {what}")
    return tensors, unread, failures


def _wrong_entry(entry: Any) -> str:
    """Returns the reason why an entry of a header cannot be read; "" if it can be."""
    if not isinstance(entry, dict):
        return f"entry is {kind_of(entry)}, expected an object"
    dtype, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"entry has the dtype {dtype!r:.60}, expected one of {', '.join(DTYPES)}"
    if not _are_whole(shape, MOST_AXES):
        return f"entry has the shape {shape!r:.60}, expected at most {MOST_AXES} whole numbers"
    if not _are_whole(offsets, 2) or len(offsets or ()) < 2:
        return f"entry has the data_offsets {offsets!r:.60}, expected two whole numbers"
    return ""


def _are_whole(values: Any, most: int) -> bool:
    """Tells whether `values` is a list of at most `most` integers >= 0 (no bool, no float)."""
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value < LARGEST for value in values)
    )


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Returns {file name: {"bytes": ..., "header_sha256": ...}} of the files of these tensors.

    It is a record of the source. The weights themselves are not read.
    """
    prints = {}
    for path in sorted({tensor.file for tensor in tensors.values()}):
        with path.open("rb") as file:
            first = file.read(8)
            header = first + file.read(int.from_bytes(first, "little"))
        prints[path.name] = {
            "bytes": path.stat().st_size,
            "header_sha256": hashlib.sha256(header).hexdigest(),
        }
    return prints


class Writer:
    """Writes tensors in any order into shards whose layout is fixed at the start.

    `specs` gives (dtype, shape) of each tensor by name; shards are filled in its order, up to
    `shard_bytes` each. A larger tensor gets a shard of its own. `close` ends the writing.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]], shard_bytes: int
    ):
        """Writes the headers of all shards and, if there are several, the index."""
        self._left = set(specs)
        self._places: dict[str, Tensor] = {}
        check({"shard_bytes": shard_bytes}, {"shard_bytes": SHARD_SIZE})
        shards = list(_shards(specs, shard_bytes))
        index = {}
        for number, keys in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else SINGLE
            self._layout(folder / name, {key: specs[key] for key in keys})
            index |= dict.fromkeys(keys, name)
        self.total_bytes = sum(slot.nbytes for slot in self._places.values())
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
        with _writing(path), path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + at)
        for key in order:
            dtype, shape = specs[key]
            begin = header[key]["data_offsets"][0]
            self._places[key] = Tensor(path, dtype, shape, 8 + len(raw) + begin)

    def write(self, key: str, array: np.ndarray) -> None:
        """Writes the tensor named `key` into its place in the file.

        Raises:
            ValueError: the tensor was written before, or has another shape or dtype than announced.
        """
        slot = self._places[key]
        if key not in self._left or array.shape != slot.shape or array.dtype != slot.dtype:
            raise ValueError(
                f"{key}: {array.shape} {array.dtype} for the place of {slot.shape} {slot.dtype}, "
                f"{'free' if key in self._left else 'taken'}"
            )
        self._left.remove(key)
        with _writing(slot.file), slot.file.open("r+b") as file:
            file.seek(slot.offset)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Checks that all tensors were written; the files are complete without it.

        Raises:
            ValueError: some were not; their places in the files hold zeros.
        """
        if self._left:
            raise ValueError(f"never written: {', '.join(sorted(self._left))}")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an OSError into one that names the file, the free space and what to do."""
    try:
        yield
    except OSError as error:
        free = free_bytes(path.parent) / 1e9
        raise OSError(
            error.errno or errno.EIO,
            f"writing {path.name} to {path.parent.parent} failed ({free:.2f} GB are free there): "
            f"{error.strerror or error}; make room there, or choose another folder",
        ) from error


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
