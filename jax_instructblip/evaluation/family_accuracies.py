"""Evaluates a checkpoint by family of questions, on `shapes` or JSON lines, with baselines.

A family is the set of records with the same `Record.task`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax_instructblip.data.shapes.dataset import DATASETS
from jax_instructblip.data.sources import open_records
from jax_instructblip.evaluation import families, suite
from jax_instructblip.evaluation.settings import DECODING, Settings
from jax_instructblip.evaluation.task import Task
from jax_instructblip.inference.batching import check_batch_size
from jax_instructblip.inference.digests import weights_digest
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.loading import describe_dtype, read_source
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.inference.pipeline import load_pipeline as load
from jax_instructblip.remote import is_remote

BATCH_SIZE = 64  # questions answered at once
_LINES = (".jsonl", ".json")  # formats whose images are separate files


@dataclasses.dataclass(frozen=True)
class TunedRun:
    """The training run whose checkpoint is evaluated.

    Attributes:
      data: the path that the run was validated on; "" for none.
      start: a digest that identifies the weights from which the run started.
      before: returns the model as it was before training, given the tuned one.
      recorded: the `metrics` and `answers` of the training, keyword arguments of `suite.write`.
    """

    data: str
    start: str
    before: Callable[[InstructBlipPipeline], InstructBlipPipeline]
    recorded: Mapping[str, Any]


def measure_families(
    settings: Settings, run: TunedRun | None = None, command: str = ""
) -> dict[str, Any]:
    """Scores exact matches by family of questions; returns the content of `results.json`.

    `run` describes `settings.checkpoint` if that is a training run; `command` is recorded in the
    results. Baselines are the best constant answer, black images ("blind") and, for a run, the
    model before training.

    Raises:
      ValueError: there are no such records, or the data or the output folder is not given.
    """
    assert settings.checkpoint is not None
    data = settings.data or (run.data if run else "")
    own = run is not None and not is_remote(settings.checkpoint)
    out = settings.out or (Path(settings.checkpoint) if own else None)
    if not data or out is None:
        missing = " and ".join(
            name for name, value in (("--data", data), ("--out", out)) if not value
        )
        raise ValueError(
            f"{missing}: needed, because {settings.checkpoint} is no run on a disk that says it"
        )
    size = BATCH_SIZE if settings.batch_size is None else settings.batch_size
    check_batch_size(size)
    tasks = open_families(settings, data)
    out.mkdir(parents=True, exist_ok=True)  # fails now if it cannot be written
    blip = load(
        settings.checkpoint,
        dtype=settings.dtype,
        template=settings.template,
        quantise=settings.quantise,
    )
    weights = weights_digest(blip.source or read_source(settings.checkpoint))
    model = {"checkpoint": settings.checkpoint, "weights": weights, "data": data}
    model["dtype"] = describe_dtype(blip.model.dtype, settings.quantise)
    blip.silent = True  # the suite shows the progress
    baselines = []
    if not settings.no_baselines:
        baselines.append(families.Baseline("blind", blip, weights, black=True))
        if run:
            baselines.append(families.Baseline("before", run.before(blip), run.start))
    finished = suite.run(
        *(blip, tasks, out),
        model=model,
        size=size,
        limit=settings.limit,
        baselines=baselines,
        replace=True,
    )
    return suite.finish(out, finished, model, command, run.recorded if run else {})


def open_families(settings: Settings, data: str) -> list[Task]:
    """Opens the splits of `data`, by default its test splits; returns a task of each.

    `data` is a JSON-lines file, a prepared dataset or `shapes`; `settings` say how it is asked.

    Raises:
      ValueError: there are no such records.
    """
    changed = settings.overrides()
    config = GenerationConfig.of(**{name: changed[name] for name in DECODING if name in changed})
    tasks = []
    for split in settings.split.split(",") if settings.split else _test_splits(data):
        records, digest = open_records(data, split)
        digest = families.content_digest(records, digest) if data.endswith(_LINES) else digest
        task = families.family_task(split, records, config, digest=digest, limit=settings.limit)
        tasks.append(dataclasses.replace(task, **settings.showing()))
    return tasks


def _test_splits(data: str) -> list[str]:
    if data in DATASETS:
        return [split for split in DATASETS[data] if split.startswith("test")]
    return ["test"]
