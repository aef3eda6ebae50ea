"""A checkpoint folder: written and read leaf by leaf, complete or absent, every byte hashed.

    folder/
      manifest.json   {"llm/embed/embedding": {"shape": [32128, 2048], "dtype": "bfloat16",
                                               "sha256": "..."}, ...}
      params/         Orbax; `orbax.checkpoint.experimental.v1.load(folder / "params")` reads it too
        state/llm.embed.embedding/0.0   the raw bytes of that leaf, uncompressed
      ...             files of the writer: config.json, tokenizers
      files.json      the sha256 of every file but the leaves (`file_hashes.py`)

A leaf is one array. Orbax notices neither a flipped bit nor a cast of dtype, and needs a whole tree
in memory. Therefore the manifest has the sha256 of every leaf, metadata are compared before data
are read, and leaves pass one at a time: peak memory is about twice the largest leaf. This module
knows nothing of models.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_instructblip.atomic import atomic_folder
from jax_instructblip.checkpoint import leaf_parts, orbax_leaves
from jax_instructblip.checkpoint.file_hashes import hash_file, verify_hashes, write_hashes
from jax_instructblip.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    compare,
    describe,
    described,
    dtype_of,
    entry_of,
    listed,
    read_manifest,
)
from jax_instructblip.checkpoint.stored_leaf import StoredParts
from jax_instructblip.checkpoint.trees import Tree, flatten, unflatten
from jax_instructblip.files import read_json

FORMAT = 1
CONFIG = "config.json"
PARAMS = "params"
GROUP_BYTES = 64 * 2**20  # small leaves are written in groups: each Orbax call costs about 50 ms

Place = Callable[[str, np.ndarray], Any]  # (path, array) -> what is kept instead of the array


def write_tree(
    folder: str | os.PathLike,
    leaves: Iterable[tuple[str, Any]],
    *,
    extra: Callable[[Path], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes a checkpoint folder from (path, array) pairs and returns its manifest.

    `leaves` may be a generator: one large leaf, or a group of small ones, is in memory at a time.
    `extra` is called at the end with the folder, still under a hidden name, to add config.json and
    other files. The folder appears under its own name when it is complete. Dtypes are kept
    (bfloat16 too).

    Raises:
        OSError: writing failed.
        ValueError: there is no leaf, or a path is given twice or lies below another leaf.
    """
    manifest: dict[str, dict[str, Any]] = {}
    with atomic_folder(folder) as temporary:
        group: dict[str, np.ndarray] = {}
        for path, leaf in leaves:
            if path in manifest:
                raise ValueError(f"leaf {path!r} is given twice")
            array = np.asarray(leaf, order="C")
            del leaf  # here and below: so that the last leaf is freed before the next one is made
            manifest[path] = entry_of(path, array)
            unflatten(dict.fromkeys(manifest))  # refuses a leaf below a leaf
            group[path] = array
            del array
            if sum(each.nbytes for each in group.values()) >= GROUP_BYTES:
                orbax_leaves.save(temporary / PARAMS, group, Path(folder))
                group = {}
        if group:
            orbax_leaves.save(temporary / PARAMS, group, Path(folder))
        if not manifest:
            raise ValueError(f"no leaves to write to {folder}")
        with orbax_leaves.writing(Path(folder), "closing the checkpoint"):
            orbax_leaves.finalize(temporary / PARAMS)
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        if extra is not None:
            extra(temporary)
        write_hashes(temporary)
    return manifest


def read_tree(
    folder: str | os.PathLike,
    *,
    expected: Mapping[str, Any] | None = None,
    strict_dtype: bool = False,
    verify: bool = True,
    place: Place | None = None,
) -> Tree:
    """The parameters of a checkpoint folder as a nested dict of numpy arrays.

    `place(path, array)` is called for each leaf as it is read, and its result is kept instead of
    the array (cast, put on a device), so a tree larger than the host's memory can pass. `expected`,
    a nested dict of leaves with `shape` and `dtype`, is compared before data are read: paths,
    shapes and, with `strict_dtype`, dtypes. `verify` compares the sha256 of each leaf.

    Raises:
        CheckpointError: lists every mismatch, or every damaged leaf.
    """
    folder = Path(folder).absolute()
    manifest, stored = _open(folder)
    if expected is not None:
        compare(
            folder,
            "this is not the checkpoint that was expected",
            described(manifest, strict_dtype),
            describe(flatten(expected), strict_dtype),
        )
    kept: dict[str, Any] = {}
    damaged: list[str] = []
    for path, array in _read(folder, stored, manifest, damaged, verify):
        if not damaged:
            kept[path] = array if place is None else place(path, array)
        del array  # before the next one is read
    _refuse_damaged(folder, damaged)
    return unflatten(kept)


def read_parts(
    folder: str | os.PathLike,
    *,
    process: int,
    processes: int,
    expected: Mapping[str, Any] | None = None,
    strict_dtype: bool = False,
    place: Callable[[str, StoredParts], Any],
) -> Tree:
    """Reads a checkpoint folder in one of several processes, which each hold parts of the leaves.

    This process is number `process`, from 0, of `processes`. `place(path, leaf)` slices the leaf
    where this process's devices need it, and only these slices are read; the result is a nested
    dict of what `place` returns. `expected` is compared as in `read_tree`. Hashes cover whole
    files, so each process verifies a share of the files.

    Raises:
        CheckpointError: lists every mismatch, or every damaged leaf of this process's share.
    """
    folder = Path(folder).absolute()
    manifest, _ = _open(folder)
    if expected is not None:
        claim = "this is not the checkpoint that was expected"
        wanted = describe(flatten(expected), strict_dtype)
        compare(folder, claim, described(manifest, strict_dtype), wanted)
    files = leaf_parts.files(folder / PARAMS, manifest)
    damaged: list[str] = []
    for file in sorted(files, key=lambda file: -_size(file))[process::processes]:
        _verify(file, *files[file], damaged)
    _refuse_damaged(folder, damaged)
    stored = lambda path: leaf_parts.stored_leaf(folder / PARAMS, path, manifest[path])
    return unflatten({path: place(path, stored(path)) for path in manifest})


def read_leaves(
    folder: str | os.PathLike, paths: Iterable[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, array) for each of `paths`, by default all leaves, one at a time, verified.

    Raises:
        CheckpointError: the folder lacks such a leaf, or is damaged.
    """
    folder = Path(folder).absolute()
    manifest, stored = _open(folder)
    paths = list(stored if paths is None else paths)
    unknown = sorted(set(paths) - stored.keys())
    if unknown:
        raise CheckpointError(listed(f"{folder} has no such leaves", unknown))
    damaged: list[str] = []
    for path, array in _read(folder, {path: stored[path] for path in paths}, manifest, damaged):
        _refuse_damaged(folder, damaged)
        yield path, array
        del array
    _refuse_damaged(folder, damaged)


def write_config(folder: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes config.json: {"format": 1} and the fields of `config`."""
    document = {"format": FORMAT, **config}
    Path(folder, CONFIG).write_text(json.dumps(document, indent=1) + "\n")


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The fields of a folder's config.json; also verifies all files that `files.json` lists.

    Raises:
        CheckpointError: config.json is missing or not from `write_config`, or a file is damaged.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint folder: it has no {CONFIG}")
    try:
        config = read_json(path, dict)
        version = config.get("format")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if version != FORMAT or isinstance(version, bool):
        why = (
            "update the package" if isinstance(version, int) else "is it another program's folder?"
        )
        raise CheckpointError(f"{path} has format {version!r}, this version reads {FORMAT}: {why}")
    verify_hashes(folder)
    return config


def _open(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The manifest, and a description (`shape`, `dtype`) of each leaf by path.

    Descriptions come from Orbax and are compared with the manifest; for leaves in parts they come
    from the manifest itself. Also compares the hashes of `files.json`.
    """
    manifest = read_manifest(folder)
    if leaf_parts.is_in_parts(manifest):
        leaf_parts.check_parts(manifest, folder)
        verify_hashes(folder)
        shape = lambda entry: jax.ShapeDtypeStruct(entry["shape"], dtype_of(entry))
        return manifest, {path: shape(entry) for path, entry in manifest.items()}
    stored = orbax_leaves.metadata(folder / PARAMS, manifest)
    claim = f"Orbax's metadata and {MANIFEST} disagree"
    compare(folder, claim, describe(stored, True), described(manifest, True))
    verify_hashes(folder)
    return manifest, stored


def _read(
    folder: Path,
    stored: Mapping[str, Any],
    manifest: Mapping[str, Any],
    damaged: list[str],
    verify: bool = True,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, array) for each leaf in `stored`, in order.

    Leaves whose bytes differ from the manifest are not yielded but named in `damaged`.
    """
    if leaf_parts.is_in_parts(manifest):
        for path in stored:
            before, entry = len(damaged), {path: manifest[path]}
            for file, (_, expected) in leaf_parts.files(folder / PARAMS, entry).items():
                if verify:
                    _verify(file, path, expected, damaged)
            if len(damaged) == before:
                yield path, leaf_parts.stored_leaf(folder / PARAMS, path, manifest[path])[...]
        return
    for group in _groups(stored):
        for path, array in orbax_leaves.load(folder / PARAMS, group, damaged):
            if verify and entry_of(path, array) != manifest[path]:
                damaged.append(f"{path}: its bytes have another sha256 than {MANIFEST} says")
            else:
                yield path, array
            del array


def _verify(file: Path, path: str, expected: str, damaged: list[str]) -> None:
    """Adds the leaf at `path` to `damaged` if its file does not have the sha256 `expected`."""
    try:
        if hash_file(file) != expected:
            damaged.append(f"{path}: its bytes have another sha256 than {MANIFEST} says")
    except OSError as error:
        damaged.append(f"{path}: cannot be read: {error}")


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _refuse_damaged(folder: Path, damaged: list[str]) -> None:
    if damaged:
        raise CheckpointError(
            listed(f"{folder} is damaged; copy or convert it again", sorted(damaged))
        )


def _groups(stored: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    group: dict[str, Any] = {}
    size = 0
    for path, leaf in stored.items():
        bytes_ = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if group and size + bytes_ > GROUP_BYTES:
            yield group
            group, size = {}, 0
        group[path] = leaf
        size += bytes_
    if group:
        yield group
