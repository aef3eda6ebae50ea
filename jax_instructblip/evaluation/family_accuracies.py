"""A checkpoint measured by family of questions: on `shapes` and on JSON lines, beside baselines."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax_instructblip.data.shapes.dataset import DATASETS
from jax_instructblip.data.sources import open_records
from jax_instructblip.evaluation import families, suite
from jax_instructblip.evaluation.settings import DECODING, Settings
from jax_instructblip.inference.batching import check_batch_size
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.loading import read_source, weights_digest
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.inference.pipeline import load_pipeline as load
from jax_instructblip.remote import is_remote

BATCH_SIZE = 64  # questions answered at once
_LINES = (".jsonl", ".json")  # whose images are files of their own


@dataclasses.dataclass(frozen=True)
class TunedRun:
    """A run whose checkpoint is measured.

    Attributes:
      data: what it was validated on; "" for nothing.
      start: a text that stands for the weights that it started from.
      before: the model that it started from, beside the one that is measured.
      recorded: what the report shows of its training, as `suite.write` takes it.
    """

    data: str
    start: str
    before: Callable[[InstructBlipPipeline], InstructBlipPipeline]
    recorded: Mapping[str, Any]


def measure_families(
    settings: Settings, run: TunedRun | None = None, command: str = ""
) -> dict[str, Any]:
    """Counts exact matches by family of questions, beside baselines; returns what is written.

    `run` is the run that `settings.checkpoint` is, if it is one; `command` is noted in the results.

    Raises:
      ValueError: there are no such records, or it is not known what to measure, or where to write.
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
    changed = settings.overrides()
    config = GenerationConfig.of(**{name: changed[name] for name in DECODING if name in changed})
    tasks = []
    for split in settings.split.split(",") if settings.split else _test_splits(data):
        records, digest = open_records(data, split)
        digest = families.content_digest(records, digest) if data.endswith(_LINES) else digest
        task = families.family_task(split, records, config, digest=digest, limit=settings.limit)
        tasks.append(dataclasses.replace(task, **settings.showing()))
    out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written: now, not afterwards
    blip = load(settings.checkpoint, dtype=settings.dtype)
    weights = weights_digest(blip.source or read_source(settings.checkpoint))
    model = {"checkpoint": settings.checkpoint, "weights": weights, "data": data}
    model["dtype"] = str(blip.model.dtype)
    blip.silent = True  # the suite says how far it is
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


def _test_splits(data: str) -> list[str]:
    if data in DATASETS:
        return [split for split in DATASETS[data] if split.startswith("test")]
    return ["test"]
