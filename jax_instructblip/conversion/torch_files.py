"""PyTorch files (`.pth`, `.bin`): tensors by name, and nothing else.

A pickle may hold code. `torch.load(weights_only=True)` runs none, and refuses what is no tensor.
torch itself is an extra, imported when the first file is opened.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.files import require_file


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """One tensor of a `.pth` file, mapped into memory."""

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

        rows = self.tensor
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
        stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # pickle, zip and torch have errors of their own
        first = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"{path} cannot be read as tensors alone (nothing in it was run)", [first[:300]]
        ) from error
    stored = stored.get("model", stored) if isinstance(stored, Mapping) else stored
    wrong = not isinstance(stored, Mapping) or not stored
    if wrong or not all(isinstance(each, torch.Tensor) for each in stored.values()):
        raise ConversionError(f"{path} holds no tensors by name", ["expected a state_dict"])
    return {str(name): TorchTensor(path, tensor) for name, tensor in stored.items()}
