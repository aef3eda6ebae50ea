"""A leaf on disk of which a host reads the parts that its devices hold, and no others."""

import math
from pathlib import Path
from typing import Any

import numpy as np

_read = {"bytes": 0}


def bytes_read() -> int:
    """How many bytes of leaves this process has read part by part so far."""
    return _read["bytes"]


class StoredLeaf:
    """The array in a file of raw bytes; like a numpy array, it has shape, dtype and slices."""

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: Any, cast: Any = None):
        """`dtype` is the file's, `cast` that of the parts (default: the same).

        Raises:
            OSError: the file is not there.
            ValueError: it is not as long as the array.
        """
        self.shape, self._file, self._stored = tuple(shape), file, np.dtype(dtype)
        self.dtype = np.dtype(cast or dtype)
        wanted, found = math.prod(shape) * self._stored.itemsize, file.stat().st_size
        if found != wanted:
            raise ValueError(f"{file} has {found} bytes, expected {wanted}")

    def astype(self, dtype: Any, copy: bool = False) -> "StoredLeaf":
        """The same leaf, whose parts are cast when they are read."""
        del copy
        return StoredLeaf(self._file, self.shape, self._stored, dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """The part, read now; `index` has slices of step 1."""
        whole = np.memmap(self._file, self._stored, "r", shape=self.shape or (1,))
        # The pages go back with the map: what stays is the part.
        part = np.array(whole[index] if self.shape else whole[0], copy=True)
        _read["bytes"] += part.nbytes
        return part.astype(self.dtype, copy=False)
