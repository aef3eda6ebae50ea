"""Chooses one checkpoint of a run: the newest, a given step, or the one that validated best."""

import math
import os
from pathlib import Path

from jax_instructblip.fields import check, whole
from jax_instructblip.inference.loading import resolve_checkpoint
from jax_instructblip.training.checkpoints import Checkpoints
from jax_instructblip.training.metrics import FILE, read_metrics

METRIC = "validation/score"


def choose_step(
    path: str | os.PathLike, *, step: int | None = None, best: bool = False
) -> tuple[Path, str]:
    """Returns the folder to read, and a sentence about the choice ("" if there was none).

    `path` is a run; if neither `step` nor `best` is given, it may be any other model folder or name
    that `read_source` accepts, which is returned as it is.

    Raises:
        ValueError: both `step` and `best` are given, `path` is no run, or it has no such
            checkpoint; the existing ones are listed.
        FileNotFoundError: the folder does not exist, or the run has saved nothing yet.
    """
    check({"step": step}, {"step": whole(0, optional=True)})
    folder = resolve_checkpoint(path)
    chooses = step is not None or best
    if step is not None and best:
        raise ValueError("a step and the best one are asked for: choose one of the two")
    if not (folder / "checkpoints").is_dir():
        if chooses:
            raise ValueError(
                f"{folder} is no run (it has no folder checkpoints): a step can be chosen of a run "
                "alone"
            )
        return folder, ""
    steps = Checkpoints(folder / "checkpoints").steps()
    if not steps:
        raise FileNotFoundError(
            f"{folder / 'checkpoints'} has no checkpoint yet: the run has not saved anything"
        )
    measured = _measured(folder)
    if best:
        step = _best(folder, steps, measured)
    elif step is None:
        step = steps[-1]
    elif step not in steps:
        raise ValueError(
            f"{folder} has no checkpoint of step {step}; it has those of {_listed(steps, measured)}"
        )
    words = f"step {step} of {folder}"
    if step in measured:
        words += f" ({METRIC} {measured[step]:.4f})"
    return folder / "checkpoints" / str(step), words


def _best(folder: Path, steps: list[int], measured: dict[int, float]) -> int:
    """Returns the best-scoring step (latest on a tie); a ValueError if it has no checkpoint."""
    tuned = {step: value for step, value in measured.items() if step > 0}  # 0: before tuning
    if not tuned:
        raise ValueError(
            f"{folder} was never validated ({folder / FILE} has no {METRIC}), so no step is known "
            f"as the best: choose one of {_listed(steps, measured)}, or set "
            "config.validation.path for the next run"
        )
    best = max(tuned, key=lambda step: (tuned[step], step))
    if best not in steps:
        raise ValueError(
            f"the best step of {folder} is {best} ({METRIC} {tuned[best]:.4f}), but its checkpoint "
            f"is gone; there are those of {_listed(steps, measured)}: choose one"
        )
    return best


def _measured(folder: Path) -> dict[int, float]:
    """Returns the run's validation scores by step."""
    return {
        int(line["step"]): float(line[METRIC])
        for line in read_metrics(folder)
        if METRIC in line and math.isfinite(line[METRIC])
    }


def _listed(steps: list[int], measured: dict[int, float]) -> str:
    """Formats steps with their scores for a message: `step 100, step 200 (0.8300)`."""
    words = (f"step {n}" + (f" ({measured[n]:.4f})" if n in measured else "") for n in steps)
    return ", ".join(words)
