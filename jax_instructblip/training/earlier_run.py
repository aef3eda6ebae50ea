"""Remains of an earlier run in a workdir: moved aside, or refused before a new run starts."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_instructblip.atomic import set_aside
from jax_instructblip.checkpoint.step_meta import META
from jax_instructblip.fields import dotted
from jax_instructblip.files import read_json
from jax_instructblip.training import metrics
from jax_instructblip.training.checkpoints import Checkpoints, is_step
from jax_instructblip.training.shared_save import remove_parts

CONFIG = "config.json"
SAVED = "saved"  # field of config.json: True once the run has saved a checkpoint


def set_incomplete_aside(checkpoints: Checkpoints, *, fresh: bool) -> list[str]:
    """Renames incomplete checkpoint folders in `checkpoints/`; returns one message per rename.

    Such a folder has a step number as its name but no `meta.json`, for example after an interrupted
    copy. (In an object store nothing is renamed: saving the same step again replaces it.) If
    `checkpoints/` is a dangling symlink, it is renamed if `fresh`, else it is an error.

    Raises:
        CheckpointError: a checkpoint's `meta.json` is damaged or of a newer version.
        ValueError: `checkpoints/` is a dangling symlink and not `fresh`, or is no folder.
    """
    folder, notes = checkpoints.folder, []
    if folder.is_symlink() and not folder.exists():
        lost = f"{folder} is a link to {os.readlink(folder)}, which is not there"
        if not fresh:
            raise ValueError(
                f"{lost}: is its disk mounted? Mount it; or, to start over, set FRESH=1 in the "
                "environment"
            )
        return [f"{lost}: the link is now {set_aside(folder)}"]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder: move it away, or choose another config.workdir")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_step(path.name) and not (path / META).is_file():
            notes.append(
                f"{path} is no complete checkpoint, it has no {META} (an interrupted copy?): set "
                f"aside as {set_aside(path, 'incomplete')}"
            )
    remove_parts(folder)
    for step in checkpoints.steps():
        checkpoints.meta(step)
    return notes


def set_metrics_aside(workdir: Path, checkpoints: str, *, fresh: bool) -> list[str]:
    """Renames metrics of an earlier run whose checkpoints are missing; returns messages about it.

    Call it only if there are no checkpoints. A run that was killed before its first save may start
    over by itself. Otherwise the checkpoints may be on a disk that is not mounted, so `fresh` is
    required. `checkpoints` is the location that the error message names.

    Raises:
        ValueError: there are metrics of a run that had saved checkpoints, and `fresh` is False.
    """
    path = workdir / metrics.FILE
    newest = metrics.newest_step(workdir)
    if newest == 0:
        return []
    if not fresh and read_document(workdir).get(SAVED) is not False:
        raise ValueError(
            f"{path} tells of a run of {newest} steps, but {checkpoints} has none of its "
            "checkpoints: is its disk mounted, was it moved? Put them back there; to start over "
            "set FRESH=1 in the environment (the metrics are renamed then), or choose another "
            "config.workdir"
        )
    why = "as told" if fresh else "the run before was stopped ahead of its first checkpoint"
    aside = set_aside(path)
    if (workdir / metrics.ANSWERS).exists():
        set_aside(workdir / metrics.ANSWERS)
    return [f"starting over, {why}: the metrics of its {newest} steps are now {aside}"]


def changes(workdir: Path, config: Mapping[str, Any]) -> list[str]:
    """Returns one line per field of `config` whose value differs from the workdir's config.json.

    Without that file it returns []; if the file is damaged, one line that says so.
    """
    if not (workdir / CONFIG).is_file():
        return []
    recorded = read_document(workdir).get("config")
    if not isinstance(recorded, Mapping):
        return [f"{workdir / CONFIG} is damaged: whether fields have changed cannot be told"]
    before, now = dotted(recorded), dotted(config)
    return [
        f"changed: config.{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def read_run(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Reads the config.json of a run directory; returns None if `folder` is no run directory."""
    path = Path(folder, CONFIG)
    if not Path(folder, "checkpoints").is_dir() or not path.is_file():
        return None
    return read_json(path, allow_nan=True)


def read_document(workdir: Path) -> Mapping[str, Any]:
    """Reads the workdir's config.json; returns {} if it is missing or damaged."""
    try:
        return read_json(workdir / CONFIG, dict, allow_nan=True)
    except (ValueError, OSError):
        return {}
