"""Reads and writes PyTorch files (`.pth`, `.bin`): tensors by name, and nothing else.

A pickle may hold code. `torch.load(weights_only=True)` runs none, and refuses what is no tensor.
torch itself is an extra, imported when the first file is opened. Files of before torch 1.6, which
are no zip archives, cannot be mapped: they are read whole.
"""

import dataclasses
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_instructblip.conversion.safetensors import DEQUANTISE, ConversionError
from jax_instructblip.files import require_file

_CODE = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message about an object that is no tensor
LFS_POINTER = b"version https://git-lfs"  # the start of a file that git has not fetched


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """One tensor of a `.pth` file, mapped into memory if the file is a zip archive."""

    file: Path
    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype:
        """The tensor's dtype as a numpy dtype."""
        name = str(self.tensor.dtype).removeprefix("torch.")
        return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.tensor.numel() * self.dtype.itemsize

    def read(self, part: int = 0, parts: int = 1) -> np.ndarray:
        """Returns the tensor, or piece `part` of `parts` equal ones along axis 0, as an array."""
        import torch

        rows = self.tensor.detach()
        if parts > 1:
            size = self.shape[0] // parts
            rows = rows[part * size : (part + 1) * size]
        if rows.dtype == torch.bfloat16:
            return rows.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return rows.contiguous().numpy()


def open_pth(path: Path) -> dict[str, TorchTensor]:
    """Returns the tensors of a `.pth` file by name, those below the key `model` if there is one.

    Raises:
        ConversionError: the file cannot be read, holds more than tensors, or torch is not
            installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"{path} is a PyTorch file", ["reading it takes torch: pip install -e '.[torch]'"]
        ) from error
    require_file(path)
    try:
        stored = torch.load(
            path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True
        )
    except Exception as error:  # pickle, zip and torch have errors of their own
        title = f"{path} cannot be read as tensors alone (nothing in it was run)"
        raise ConversionError(title, [_reason(path, error)]) from error
    stored = stored.get("model", stored) if isinstance(stored, Mapping) else stored
    others = _others(stored, torch.Tensor)
    if others:
        raise ConversionError(
            f"{path} holds no tensors by name",
            [
                f"found {others}; expected a state_dict, or one below the key `model`: "
                "torch.save(model.state_dict(), NAME) writes it"
            ],
        )
    unread = [
        f"{name} is {kind}, expected an array"
        for name, tensor in stored.items()
        if (kind := _unreadable(tensor))
    ]
    if unread:
        if not all(map(_has_array_dtype, stored.values())):
            unread.append(f"of quantised weights {DEQUANTISE}")
        raise ConversionError(f"{path} holds tensors that cannot be read", unread)
    return {str(name): TorchTensor(path, tensor) for name, tensor in stored.items()}


def save_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name to a new file, as `torch.save` writes a state_dict; dtypes are kept.

    Raises:
        ConversionError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"{path.name} is a PyTorch file", ["writing it takes torch: pip install -e '.[torch]'"]
        ) from error
    tensors = {}
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        if array.dtype == ml_dtypes.bfloat16:
            tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensors[name] = torch.from_numpy(array)
    torch.save(tensors, path)


def merge_files(files: Iterable[Mapping[str, TorchTensor]]) -> dict[str, TorchTensor]:
    """Returns the tensors of several files by name.

    Raises:
        ConversionError: a name has different values in two files.
    """
    tensors: dict[str, TorchTensor] = {}
    differing: dict[tuple[Path, Path], list[str]] = {}
    for file in files:
        for name in file.keys() & tensors.keys():
            one, other = tensors[name], file[name]
            if not _equal(one, other):
                differing.setdefault((one.file, other.file), []).append(name)
        tensors |= file
    if differing:
        raise ConversionError(
            "files have different values for the same tensors: give those of one model",
            [
                f"{one} and {other}: {len(names)} tensors, such as {min(names)}"
                for (one, other), names in differing.items()
            ],
        )
    return tensors


def _equal(one: TorchTensor, other: TorchTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    raw = lambda tensor: tensor.read().reshape(-1).view(np.uint8)
    return np.array_equal(raw(one), raw(other))


def _unreadable(tensor: Any) -> str:
    """Returns the kind of a tensor whose numbers are no plain array; "" for a plain one."""
    if tensor.is_meta:
        return "without data (device meta)"
    if str(tensor.layout) != "torch.strided":
        return f"sparse ({tensor.layout})"
    return "" if _has_array_dtype(tensor) else f"of the dtype {tensor.dtype}"


def _has_array_dtype(tensor: Any) -> bool:
    """Tells whether numpy has the dtype of a tensor; float8 and torch's quantised ones it lacks."""
    name = str(tensor.dtype).removeprefix("torch.")
    return name == "bfloat16" or hasattr(np, name)


def _others(stored: Any, tensor: type) -> str:
    """Returns a description of the content if it is no dict of tensors, else ""."""
    if not isinstance(stored, Mapping):
        return f"a {type(stored).__name__}"
    if not stored:
        return "nothing"
    wrong = [
        f"{str(key):.60} ({type(each).__name__})"
        for key, each in stored.items()
        if not isinstance(each, tensor)
    ]
    return ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if wrong[5:] else "")


def _reason(path: Path, error: Exception) -> str:
    """Returns a line about a file that torch cannot load.

    torch's own message is not passed on whole: it advises to run the code in the file.
    """
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if not start:
        return "it is empty: get it again"
    if start == LFS_POINTER:
        return "it is a pointer of git-lfs, not the file itself: run `git lfs pull`"
    if not start.startswith((b"PK", b"\x80")):  # a zip archive; a pickle, as before torch 1.6
        return f"it is no file of PyTorch, for it begins with {start!r}: get it again"
    if code := _CODE.search(str(error)):
        return (
            f"it holds {code[1]}, no tensor: take it to torch.save(model.state_dict(), NAME) "
            "where it is trusted"
        )
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{first[:200]}: is it damaged? Get it again"
