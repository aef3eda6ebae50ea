"""Leaves of a checkpoint folder as Orbax writes and reads them, with its errors as sentences."""

import contextlib
import errno
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from jax_instructblip.atomic import free_bytes
from jax_instructblip.checkpoint.manifest import CheckpointError, dtype_of, listed
from jax_instructblip.checkpoint.trees import flatten, unflatten

SETTLE_SECONDS = 0.3  # after a failure, for the leaves of the same group to end


def save(params: Path, group: dict[str, np.ndarray], folder: Path) -> None:
    """Writes these leaves; an OSError names `folder`, as which it will appear."""
    options = _alone()
    # One plain file a leaf: damage can be named, and 90 leaves take 0.1 s where OCDBT takes 2.
    options.array.saving.use_ocdbt = False
    options.array.saving.use_zarr3 = False
    options.array.saving.use_compression = False  # float weights shrink by a tenth, in minutes
    tree = unflatten(group)
    first, *others = group
    doing = f"writing {first}" + (f" and {len(others)} other leaves" if others else "")
    with writing(folder, doing), options:
        ocp.partial.save(str(params), tree)


def finalize(params: Path) -> None:
    """Ends the writing of leaves."""
    with _alone():
        ocp.partial.finalize(str(params))
    # Orbax notes there where it wrote: a path of this machine, which nobody reads again.
    (params / "commit_success.txt").write_text("committed\n")


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
    """Tells news from what asyncio logs of a failed save when its other futures are collected."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or ".partial-" not in str(error)


@contextlib.contextmanager
def writing(folder: Path, doing: str) -> Iterator[None]:
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
    """The first line of an error, without the specification that TensorStore appends."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.partition(" [tensorstore_spec")[0]


def metadata(params: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Orbax's own description of each leaf, which also asks for it as a numpy array."""
    try:
        with _quiet(), _alone():
            tree = ocp.metadata(str(params)).metadata
            if not isinstance(tree, Mapping):
                raise ValueError("Orbax cannot read its metadata")
        return flatten(tree)
    except Exception as error:  # whatever a damaged folder makes Orbax raise
        reason = _reason(error)
    damaged: list[str] = []  # the leaves that cannot be read one by one name the damage
    for path, entry in manifest.items():
        zero = np.broadcast_to(np.zeros((), dtype_of(entry)), entry["shape"])
        for _ in load(params, {path: zero}, damaged):
            pass
    raise CheckpointError(
        listed(f"{params} is damaged; copy or convert it again", damaged or [reason])
    )


def load(
    params: Path, group: Mapping[str, Any], damaged: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a group; a leaf that cannot be read is added to `damaged` by name."""
    options = _alone()
    options.pytree.loading.partial_load = True
    try:
        with _quiet(), options:
            arrays = flatten(ocp.load(str(params), unflatten(group)))
    except Exception as error:  # damage inside Orbax's own files has many faces
        if len(group) == 1:
            damaged.append(f"{next(iter(group))}: cannot be read: {_reason(error)}")
            return
        for path, leaf in group.items():
            yield from load(params, {path: leaf}, damaged)
        return
    for path in group:  # Orbax hands them back sorted
        yield path, np.asarray(arrays.pop(path))
