"""An array (leaf) on disk that is sliced like a numpy array; only the slices are read.

With it, a host reads only the parts of a leaf that its devices hold.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_read = {"bytes": 0}
_BLOCK = 16 * 2**20  # bytes of a file that are mapped at a time


def bytes_read() -> int:
    """The number of bytes that this process has so far read by slicing `StoredParts`."""
    return _read["bytes"]


@dataclasses.dataclass(frozen=True)
class StoredPart:
    """A file with the raw bytes of a part of a leaf.

    `start` is the index in the leaf at which the part begins, `shape` that of the part.
    """

    file: Path
    start: tuple[int, ...]
    shape: tuple[int, ...]

    def map(self, dtype: np.dtype) -> np.ndarray:
        """Maps the file into memory as an array of the part's shape, without reading it."""
        return np.memmap(self.file, dtype, "r", shape=self.shape or (1,)).reshape(self.shape)


class StoredParts:
    """An array stored as one file per part; has shape, dtype and slicing like a numpy array."""

    def __init__(
        self, parts: Sequence[StoredPart], shape: tuple[int, ...], dtype: Any, cast: Any = None
    ):
        """Takes the files' `dtype`, and as `cast` the dtype of what is read (default: the same).

        Raises:
            OSError: a file does not exist.
            ValueError: the length of a file does not fit its part.
        """
        self.shape, self._parts, self._stored = tuple(shape), parts, np.dtype(dtype)
        self.dtype = np.dtype(cast or dtype)
        for part in parts:
            wanted = math.prod(part.shape) * self._stored.itemsize
            size = part.file.stat().st_size
            if size != wanted:
                raise ValueError(f"{part.file} has {size} bytes, expected {wanted}")

    def astype(self, dtype: Any, copy: bool = False) -> "StoredParts":
        """Returns this leaf with another dtype, cast when parts are read; `copy` is ignored."""
        del copy
        return StoredParts(self._parts, self.shape, self._stored, dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads a slice from the files; `index` is `...`, or whole numbers and slices of step 1."""
        index = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        single = tuple(axis for axis, each in enumerate(index) if not isinstance(each, slice))
        bounds = [
            (each.indices(size)[:2] if isinstance(each, slice) else (each, each + 1))
            for each, size in zip(index, self.shape, strict=True)
        ]
        out = np.empty([end - begin for begin, end in bounds], self._stored)
        for part in self._parts if out.size else ():
            self._copy(part, bounds, out)
        return (
            out.astype(self.dtype, copy=False).squeeze(single)
            if single
            else out.astype(self.dtype, copy=False)
        )

    def _copy(self, part: StoredPart, bounds: list[tuple[int, int]], out: np.ndarray) -> None:
        """Copies to `out`, the array of the region `bounds`, what `part` has of that region."""
        source, target = [], []
        for (begin, end), first, size in zip(bounds, part.start, part.shape, strict=False):
            low, high = max(begin, first), min(end, first + size)
            if low >= high:
                return
            source.append(slice(low - first, high - first))
            target.append(slice(low - begin, high - begin))
        region = out[tuple(target)]
        if not source:
            out[...] = part.map(self._stored)
        else:
            rows, *others = source
            step = max(1, _BLOCK * len(region) // max(region.nbytes, 1))
            for row in range(rows.start, rows.stop, step):
                some = slice(row, min(row + step, rows.stop))
                # A map of its own for each block: its pages go back before the next are read.
                block = part.map(self._stored)[(some, *others)]
                region[row - rows.start : row - rows.start + len(block)] = block
                del block
        _read["bytes"] += region.nbytes


class StoredLeaf(StoredParts):
    """An array stored whole in one file of raw bytes."""

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: Any):
        """Takes the file, and shape and dtype of the array in it.

        Raises:
            OSError: the file does not exist.
            ValueError: its length does not fit the shape.
        """
        super().__init__([StoredPart(file, (0,) * len(shape), tuple(shape))], shape, dtype)
