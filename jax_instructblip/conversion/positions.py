"""Resizes the position table of the vision tower for images of another size.

The released code does so once, when it loads a tower: bicubic interpolation as in PyTorch, without
antialiasing, in float32; the row of CLS stays. EVA ViT-g has `align_corners` False, CLIP True.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from jax_instructblip.conversion.stored_model import Leaves, StoredModel
from jax_instructblip.models.variants import VisionConfig

PATH = "vision/pos_embed"
A = -0.75  # the parameter of the cubic kernel in PyTorch; PIL and JAX have -0.5


def cubic_weights(size: int, new_size: int, *, align_corners: bool = False) -> np.ndarray:
    """Returns float32 weights [new_size, size]: each new point is a weighted sum of old points.

    Points beyond the border have the value of the border. Each row sums to 1.
    """
    new = np.arange(new_size, dtype=np.float64)
    if align_corners:
        at = new * (size - 1) / max(new_size - 1, 1)
    else:
        at = (new + 0.5) * size / new_size - 0.5
    first = np.floor(at).astype(np.int64)
    weights = np.zeros((new_size, size))
    for tap in (-1, 0, 1, 2):
        distance = np.abs(at - (first + tap))
        near = ((A + 2) * distance - (A + 3)) * distance**2 + 1
        far = A * (((distance - 5) * distance + 8) * distance - 4)
        column = np.clip(first + tap, 0, size - 1)
        np.add.at(weights, (np.arange(new_size), column), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)


def resize_positions(
    table: np.ndarray, side: int, *, align_corners: bool = False, path: str = PATH
) -> np.ndarray:
    """Resizes a table [1, 1 + old^2, D] to [1, 1 + side^2, D], float32.

    Raises:
        ValueError: the patches of `table` are no square; the message calls it `path`.
    """
    shape = list(table.shape)
    patches = shape[1] - 1 if len(shape) == 3 else 0
    old = math.isqrt(max(patches, 0))
    if shape[:1] != [1] or old < 1 or old * old != patches:
        raise ValueError(
            f"{path} has the shape {shape}, expected [1, 1 + N x N, D]: CLS and a square of "
            f"patches, to be resized to {side} x {side}"
        )
    table = np.asarray(table[...]).astype(np.float32)
    weights = cubic_weights(old, side, align_corners=align_corners)
    grid = table[0, 1:].reshape(old, old, -1)
    grid = np.einsum("Yy,Xx,yxD->YXD", weights, weights, grid, optimize=True)
    return np.concatenate([table[:, :1], grid.reshape(1, side * side, -1)], axis=1)


def fit_positions(path: str, array: Any, vision: VisionConfig) -> Any:
    """Returns the leaf `array` of a checkpoint, resized to fit `vision` if it is the table.

    `path` tells: the table is at `PATH`. Other leaves are returned as they are.
    """
    if path != PATH or tuple(array.shape[1:2]) == (vision.tokens,):
        return array
    side = vision.image_size // vision.patch_size
    return resize_positions(array, side, align_corners=vision.align_corners)


def resize_note(old: VisionConfig, new: VisionConfig) -> str:
    """Returns a sentence that says how positions are resized, or "" if they are not."""
    if old.image_size == new.image_size:
        return ""
    before, after = (each.image_size // each.patch_size for each in (old, new))
    return (
        f"images of {new.image_size} pixels a side, the base is of {old.image_size}: {PATH} is "
        f"resized from {before} x {before} to {after} x {after} patches"
    )


def with_positions(model: StoredModel) -> StoredModel:
    """Returns `model`, whose position table is resized when read, if its variant needs it so."""
    entry, vision = model.manifest[PATH], model.variant.vision
    if entry["shape"][1] == vision.tokens:
        return model
    resized = {**entry, "shape": [1, vision.tokens, vision.width], "dtype": "float32"}

    def read(paths: Iterable[str]) -> Leaves:
        for path, array in model.read(paths):
            yield path, fit_positions(path, array, vision)

    return dataclasses.replace(model, manifest={**model.manifest, PATH: resized}, read=read)
