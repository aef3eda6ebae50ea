"""A checkpoint folder: written and read leaf by leaf, whole or not at all, never silently changed.

    folder/
      manifest.json   {"llm/embed/embedding": {"shape": [32128, 2048], "dtype": "bfloat16",
                                               "sha256": "..."}, ...}
      params/         Orbax; `orbax.checkpoint.experimental.v1.load(folder / "params")` reads it too
        state/llm.embed.embedding/0.0   the raw bytes of that leaf, uncompressed
      ...             what the writer adds: config.json, tokenizers

Orbax notices neither a flipped bit nor a dtype that it casts, and wants a whole tree in memory when
it is handed one. So every leaf has its sha256 in the manifest, metadata are compared before data
are read, and leaves pass one at a time: peak memory is about twice the largest. Nothing here knows
a model.
"""

import contextlib
import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from jax_instructblip import processes
from jax_instructblip.files import read_json
from jax_instructblip.folders import atomic_folder, free_bytes
from jax_instructblip.manifest import (
    MANIFEST,
    CheckpointError,
    compare,
    describe,
    described,
    dtype_of,
    entry_of,
    listed,
    manifest_bytes,
    manifest_digest,
    read_manifest,
)
from jax_instructblip.stored_leaf import StoredLeaf
from jax_instructblip.trees import Tree, flatten, unflatten

FORMAT = 1
CONFIG = "config.json"
PARAMS = "params"
GROUP_BYTES = 64 * 2**20  # small leaves travel together: each Orbax call costs about 50 ms

SETTLE_SECONDS = 0.3  # after a failure, for the leaves of the same group to end

__all__ = [
    "CheckpointError",
    "atomic_folder",
    "flatten",
    "manifest_bytes",
    "manifest_digest",
    "read_config",
    "read_leaves",
    "read_manifest",
    "read_parts",
    "read_tree",
    "unflatten",
    "write_config",
    "write_tree",
    "write_tree_apart",
]

Place = Callable[[str, np.ndarray], Any]


def write_tree(
    folder: str | os.PathLike,
    leaves: Iterable[tuple[str, Any]],
    *,
    extra: Callable[[Path], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The manifest of the checkpoint folder that it writes from (path, array) pairs.

    `leaves` may be a generator: one leaf is held at a time, and small ones in groups. `extra` is
    called with the still hidden folder at the end, to add config.json and the like before it
    appears under its name. Dtypes are kept (bfloat16 too). Raises OSError when writing fails.
    """
    manifest: dict[str, dict[str, Any]] = {}
    with atomic_folder(folder) as temporary:
        group: dict[str, np.ndarray] = {}
        for path, leaf in leaves:
            if path in manifest:
                raise ValueError(f"leaf {path!r} is given twice")
            array = np.asarray(leaf, order="C")
            del leaf  # here and below: the next leaf is made while no name holds the last one
            manifest[path] = entry_of(path, array)
            unflatten(dict.fromkeys(manifest))  # refuses a leaf below a leaf
            group[path] = array
            del array
            if sum(each.nbytes for each in group.values()) >= GROUP_BYTES:
                _save(temporary, group, Path(folder))
                group = {}
        if group:
            _save(temporary, group, Path(folder))
        if not manifest:
            raise ValueError(f"no leaves to write to {folder}")
        with _writing(Path(folder), "closing the checkpoint"):
            with _alone():
                ocp.partial.finalize(str(temporary / PARAMS))
            # Orbax notes there where it wrote: a path of this machine, which nobody reads again.
            (temporary / PARAMS / "commit_success.txt").write_text("committed\n")
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        if extra is not None:
            extra(temporary)
    return manifest


def write_tree_apart(
    folder: str | os.PathLike, leaves: Iterable[tuple[str, np.ndarray]]
) -> dict[str, dict[str, Any]]:
    """As `write_tree`, in a process of its own, of leaves that are all in memory.

    For one of several processes of a run: Orbax would wait for the others to write with it.
    """
    with processes.pool(1, _without_accelerator) as pool:
        return pool.submit(write_tree, folder, list(leaves)).result()


def _without_accelerator() -> None:
    jax.config.update("jax_platforms", "cpu")  # the run holds the others


def read_tree(
    folder: str | os.PathLike,
    *,
    expected: Mapping[str, Any] | None = None,
    strict_dtype: bool = False,
    verify: bool = True,
    place: Place | None = None,
) -> Tree:
    """The parameters of a checkpoint folder as a nested dict of numpy arrays.

    `place(path, array)` returns what is kept instead of the array (cast, put on a device), leaf by
    leaf, so a tree larger than the host memory can pass. `expected`, a nested dict of anything with
    `shape` and `dtype`, is compared before data are read: keys, shapes and, with `strict_dtype`,
    dtypes. `verify` compares the sha256 of each leaf. Raises CheckpointError, which lists every
    mismatch or every damaged leaf.
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
    for path, array in _read(folder, stored, manifest if verify else {}, damaged):
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
    place: Callable[[str, StoredLeaf], Any],
) -> Tree:
    """As `read_tree`, for one of several processes, each of which holds parts of the leaves.

    `place(path, leaf)` slices the leaf where its devices need it, and only that is read. Of the
    hashes, which are of whole leaves, each process compares its share: all are, by all together.
    """
    folder = Path(folder).absolute()
    manifest, stored = _open(folder)
    if expected is not None:
        claim = "this is not the checkpoint that was expected"
        wanted = describe(flatten(expected), False)
        compare(folder, claim, described(manifest, False), wanted)
    largest_first = sorted(stored, key=lambda path: -math.prod(stored[path].shape))
    damaged: list[str] = []
    for _ in _read(
        folder, {p: stored[p] for p in largest_first[process::processes]}, manifest, damaged
    ):
        pass
    _refuse_damaged(folder, damaged)
    kept = {}
    for path, entry in manifest.items():
        name = ".".join("0" * max(len(entry["shape"]), 1))  # of Zarr's only chunk
        file = folder / PARAMS / "state" / path.replace("/", ".") / name
        kept[path] = place(path, StoredLeaf(file, entry["shape"], dtype_of(entry)))
    return unflatten(kept)


def read_leaves(
    folder: str | os.PathLike, paths: Iterable[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves (path, array) in the order of `paths`, default all, verified, one at a time."""
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
    """Writes config.json: {"format": 1} and what the caller has to say of the parameters."""
    document = {"format": FORMAT, **config}
    Path(folder, CONFIG).write_text(json.dumps(document, indent=1) + "\n")


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The config.json that `write_config` wrote; CheckpointError where it is none of ours."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint folder: it has no {CONFIG}")
    try:
        config = read_json(path, dict)
        found = config.get("format")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if found != FORMAT:
        why = "update the package" if isinstance(found, int) else "is it another program's folder?"
        raise CheckpointError(f"{path} has format {found!r}, this version reads {FORMAT}: {why}")
    return config


def _open(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The manifest and Orbax's metadata, which agree."""
    manifest = read_manifest(folder)
    stored = _stored(folder, manifest)
    claim = f"Orbax's metadata and {MANIFEST} disagree"
    compare(folder, claim, describe(stored, True), described(manifest, True))
    return manifest, stored


def _read(
    folder: Path, stored: Mapping[str, Any], manifest: Mapping[str, Any], damaged: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves in that order; those that differ from the manifest are named in `damaged`."""
    for group in _groups(stored):
        for path, array in _load(folder, group, damaged):
            if path in manifest and entry_of(path, array) != manifest[path]:
                damaged.append(f"{path}: its bytes have another sha256 than {MANIFEST} says")
            else:
                yield path, array
            del array


def _refuse_damaged(folder: Path, damaged: list[str]) -> None:
    if damaged:
        raise CheckpointError(
            listed(f"{folder} is damaged; copy or convert it again", sorted(damaged))
        )


def _save(temporary: Path, group: dict[str, np.ndarray], folder: Path) -> None:
    options = _alone()
    # One plain file a leaf: damage can be named, and 90 leaves take 0.1 s where OCDBT takes 2.
    options.array.saving.use_ocdbt = False
    options.array.saving.use_zarr3 = False
    options.array.saving.use_compression = False  # float weights shrink by a tenth, in minutes
    tree = unflatten(group)
    first, *others = group
    doing = f"writing {first}" + (f" and {len(others)} other leaves" if others else "")
    with _writing(folder, doing), options:
        ocp.partial.save(str(temporary / PARAMS), tree)


def _alone() -> ocp.Context:
    """Options of a process that reads or writes by itself, whatever the others of its run do."""
    options, me = ocp.Context(), jax.process_index()
    if jax.process_count() > 1:
        options.multiprocessing.primary_host = me
        options.multiprocessing.active_processes = {me}
        options.multiprocessing.barrier_sync_key_prefix = f"alone_{me}"
    return options


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mutes what Orbax prints of an error that is raised, too, and reported in one sentence.

    It handles the leaves of a group at the same time and, when one fails, neither stops the others
    nor waits for them; what they then tell its closed event loop reaches `sys.unraisablehook`.
    """
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [log.level for log in logs]
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    for log in logs:
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except BaseException:
        time.sleep(SETTLE_SECONDS)
        logging.getLogger("asyncio").addFilter(_is_news)  # once: the same filter is not added again
        raise
    finally:
        sys.unraisablehook = hook
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _is_news(record: logging.LogRecord) -> bool:
    """Not what asyncio logs of a failed save when its other futures are collected, later on."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or ".partial-" not in str(error)


@contextlib.contextmanager
def _writing(folder: Path, doing: str) -> Iterator[None]:
    """Turns what Orbax raises while writing into one OSError with the place and the room left."""
    try:
        with _quiet():
            yield
    except (ValueError, OSError, RuntimeError) as error:
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(
            number,
            f"{folder}: {doing} failed, nothing was left there "
            f"({free_bytes(folder) / 1e9:.2f} GB were free): {_reason(error)}",
        ) from error


def _reason(error: Exception) -> str:
    """What a library says of an error, without the specification that TensorStore appends."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.partition(" [tensorstore_spec")[0]


def _stored(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Orbax's own description of each leaf, which also asks for it as a numpy array."""
    try:
        with _quiet(), _alone():
            found = ocp.metadata(str(folder / PARAMS)).metadata
            if not isinstance(found, Mapping):
                raise ValueError("Orbax cannot read its metadata")
        return flatten(found)
    except Exception as error:  # whatever a damaged folder makes Orbax raise
        reason = _reason(error)
    damaged: list[str] = []  # the leaves that cannot be read one by one name the damage
    for path, entry in manifest.items():
        zero = np.broadcast_to(np.zeros((), dtype_of(entry)), entry["shape"])
        for _ in _load(folder, {path: zero}, damaged):
            pass
    raise CheckpointError(
        listed(f"{folder / PARAMS} is damaged; copy or convert it again", damaged or [reason])
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


def _load(
    folder: Path, group: Mapping[str, Any], damaged: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a group; a leaf that cannot be read is added to `damaged` by name."""
    options = _alone()
    options.pytree.loading.partial_load = True
    try:
        with _quiet(), options:
            arrays = flatten(ocp.load(str(folder / PARAMS), unflatten(group)))
    except Exception as error:  # damage inside Orbax's own files has many faces
        if len(group) == 1:
            damaged.append(f"{next(iter(group))}: cannot be read: {_reason(error)}")
            return
        for path, leaf in group.items():
            yield from _load(folder, {path: leaf}, damaged)
        return
    for path in group:  # Orbax hands them back sorted
        yield path, np.asarray(arrays.pop(path))
