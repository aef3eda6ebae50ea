"""`manifest.json`, the list of a checkpoint folder's leaves, and comparison of such lists.

A leaf is one array.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_instructblip.files import read_json

MANIFEST = "manifest.json"
_FIELDS = ({"shape", "dtype", "sha256"}, {"shape", "dtype", "parts"})  # parts: `leaf_parts.py`


class CheckpointError(ValueError):
    """Raised for a damaged or unexpected checkpoint; the message lists all reasons."""


def read_manifest(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """The manifest of a checkpoint folder: leaf path -> shape, dtype, and sha256 or parts.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint folder: it has no {MANIFEST}")
    try:
        manifest = read_json(path, dict)
        for leaf, entry in manifest.items():
            if set(entry) not in _FIELDS:
                raise ValueError(f"entry {leaf!r} has fields {sorted(entry)}")
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return manifest


def manifest_bytes(manifest: Mapping[str, Any]) -> int:
    """The total size, in bytes, of all leaves in a manifest."""
    return sum(math.prod(entry["shape"]) * dtype_of(entry).itemsize for entry in manifest.values())


def dtype_of(entry: Mapping[str, Any]) -> np.dtype:
    """The dtype in a leaf's manifest entry, which may be one that numpy lacks (bfloat16)."""
    name = entry["dtype"]
    return np.dtype(getattr(ml_dtypes, name, name))


def manifest_digest(folder: str | os.PathLike) -> str:
    """The sha256 (hex) of a folder's manifest, which covers all leaves through their hashes."""
    canonical = json.dumps(read_manifest(folder), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def entry_of(path: str, array: np.ndarray) -> dict[str, Any]:
    """The manifest entry of a leaf: shape, dtype, sha256.

    Raises:
        ValueError: the array does not hold numbers; the message names `path`.
    """
    if array.dtype.hasobject or array.dtype.kind in "USM":
        raise ValueError(f"leaf {path!r} has dtype {array.dtype}: only numbers can be stored")
    raw = array.reshape(-1).view(np.uint8).data
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def describe(leaves: Mapping[str, Any], dtypes: bool) -> dict[str, tuple]:
    """(shape, dtype) of each leaf by path, for `compare`; no dtype (None) unless `dtypes`.

    `leaves` maps path to anything with `shape` and `dtype`.
    """
    return {
        path: (tuple(leaf.shape), np.dtype(leaf.dtype).name if dtypes else None)
        for path, leaf in leaves.items()
    }


def described(manifest: Mapping[str, Any], dtypes: bool) -> dict[str, tuple]:
    """(shape, dtype) of each leaf in a manifest, for `compare`; no dtype (None) unless `dtypes`."""
    return {
        path: (tuple(entry["shape"]), entry["dtype"] if dtypes else None)
        for path, entry in manifest.items()
    }


def compare(
    folder: Path, claim: str, found: Mapping[str, tuple], wanted: Mapping[str, tuple]
) -> None:
    """Compares the leaves of a checkpoint folder with those that are wanted.

    Args:
        folder: names the checkpoint in the message; it is not read.
        claim: says in the message what a difference means, as in "this is not the checkpoint that
            was expected".
        found: the folder's leaves, as `described` returns them.
        wanted: (shape, dtype) by path, as `describe` returns it.

    Raises:
        CheckpointError: lists all differences in paths, shapes and dtypes.
    """
    reasons = []
    for path in sorted(found.keys() | wanted.keys()):
        if path not in found:
            reasons.append(f"{path}: missing, expected {_words(wanted[path])}")
        elif path not in wanted:
            reasons.append(f"{path}: unexpected, found {_words(found[path])}")
        elif found[path] != wanted[path]:
            reasons.append(f"{path}: found {_words(found[path])}, expected {_words(wanted[path])}")
    if reasons:
        raise CheckpointError(listed(f"{folder}: {claim}", reasons))


def _words(description: tuple) -> str:
    shape, dtype = description
    return " ".join(filter(None, ("[" + ", ".join(map(str, shape)) + "]", dtype)))


def listed(title: str, reasons: list[str]) -> str:
    """A message of several lines: the title with the number of reasons, then the reasons."""
    return "\n  ".join([f"{title} ({len(reasons)}):", *reasons])
