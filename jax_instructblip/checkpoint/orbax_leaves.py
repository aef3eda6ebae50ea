"""Writing and reading the leaves (arrays) of a checkpoint folder by Orbax, with readable errors."""

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

SETTLE_SECONDS = 0.3  # wait after a failure, until the other leaves of the group have ended


def save(params: Path, group: dict[str, np.ndarray], folder: Path) -> None:
    """Writes the leaves of `group`, arrays by path, below `params` of an unfinished checkpoint.

    Raises:
        OSError: writing failed; names `folder`, the path of the finished checkpoint.
    """
    options = _alone()
    # One plain file per leaf: an error can name it, and 90 leaves take 0.1 s (OCDBT: 2 s).
    options.array.saving.use_ocdbt = False
    options.array.saving.use_zarr3 = False
    options.array.saving.use_compression = False  # takes minutes, saves a tenth of float weights
    tree = unflatten(group)
    first, *others = group
    doing = f"writing {first}" + (f" and {len(others)} other leaves" if others else "")
    with writing(folder, doing), options:
        ocp.partial.save(str(params), tree)


def finalize(params: Path) -> None:
    """Completes the Orbax checkpoint in `params` after the last leaf is written."""
    with _alone():
        ocp.partial.finalize(str(params))
    # Orbax puts a path of this machine into this file, which nobody reads again.
    (params / "commit_success.txt").write_text("committed\n")


def _alone() -> ocp.Context:
    """An Orbax context for a process that reads or writes by itself, whatever the others do."""
    options, me = ocp.Context(), jax.process_index()
    if jax.process_count() > 1:
        options.multiprocessing.primary_host = me
        options.multiprocessing.active_processes = {me}
        options.multiprocessing.barrier_sync_key_prefix = f"alone_{me}"
    return options


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mutes Orbax's log messages about an error that is also raised.

    Orbax handles the leaves of a group concurrently. When one fails, Orbax neither stops the others
    nor waits for them; their errors come after its event loop has closed, at `sys.unraisablehook`.
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
    """A log filter: False for asyncio's reports on a failed save, which was raised already."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or ".partial-" not in str(error)


@contextlib.contextmanager
def writing(folder: Path, doing: str) -> Iterator[None]:
    """A context that turns an error of Orbax into an OSError with path, reason and free space.

    `folder` is the path of the checkpoint; `doing` names the action in the message, as in
    "closing the checkpoint".
    """
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
    """Orbax's description of each leaf by path, which `load` takes to return numpy arrays.

    Raises:
        CheckpointError: the folder is damaged; names the leaves that cannot be read.
    """
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
    """Yields (path, array) of each leaf in `group`; appends to `damaged` why one cannot be read.

    `group` maps paths to descriptions of leaves, from `metadata`.
    """
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
