"""The measurements of a run while it trains, by which it chooses its best checkpoint."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.records import Record
from jax_instructblip.data.sources import dataset_name
from jax_instructblip.data.templates import PAPER, TextStyle
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.evaluation import answering, families
from jax_instructblip.evaluation.blip2_protocols import get_benchmark
from jax_instructblip.evaluation.grouping import plan
from jax_instructblip.evaluation.metrics import caption_scores
from jax_instructblip.evaluation.metrics.metric import MetricError
from jax_instructblip.evaluation.predictions import Prediction
from jax_instructblip.evaluation.protocol import BENCHMARKS
from jax_instructblip.evaluation.retrieval_scores import retrieval_scores
from jax_instructblip.evaluation.scoring import HIDDEN, NO_METRIC, is_known, score
from jax_instructblip.evaluation.task import check_choices, open_task, pick_numbers
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.models.blip2 import Blip2
from jax_instructblip.models.vlm import VisionLanguageModel

SAMPLES = 8  # answers to show
_LOOKED_AT = 64  # records, of which one must have a right answer


def check(records: Sequence[Record], path: str, split: str) -> None:
    """Looks before anything is trained whether the records of that path can be scored.

    Raises:
      MetricError: they cannot be.
    """
    name = dataset_name(path)
    metric = BENCHMARKS[name].metric if name else families.METRIC
    some = [records[number] for number in pick_numbers(len(records), _LOOKED_AT)]
    try:
        if not metric:
            raise MetricError(NO_METRIC)
        if not any(is_known(record, metric) for record in some):
            raise MetricError(HIDDEN)
        if metric == "cider":
            caption_scores.find_tools()
    except MetricError as error:
        raise MetricError(f"config.validation.path is {path}, {split}: {error}") from error


def evaluate(
    *,
    model: VisionLanguageModel | Blip2,
    params: dict[str, Any],
    text: TextProcessor | CaptionTokenizer,
    records: Sequence[Record],
    mesh: Mesh | None = None,
    limit: int = 0,
    batch_size: int = 64,
    max_new_tokens: int = 30,
    path: str = "",
    split: str = "",
    style: TextStyle = PAPER,
    upright: bool = True,
    take_samples: Callable[[list[dict[str, Any]]], None] | None = None,
) -> dict[str, float]:
    """Scores of the model on the validation records: the headline metric first, `score` last.

    `score` is the headline again, under a name that every run has: its best checkpoint is the one
    of the highest. Of a folder `path` that `jax-instructblip prepare` wrote, the headline is the
    dataset's own metric (of captions CIDEr), with the prompt and the settings of its protocol. Of
    other records it is `accuracy`: exact match of whole answers, the mean over the families, with
    `accuracy/FAMILY`. `limit` questions are taken; 0 takes all. `take_samples` is called with a few
    rows of the predictions, always of the same questions. `style` and `upright` are those of
    training: how texts are written, and whether photographs are turned.

    Of BLIP-2's first stage it is `recall`, the mean R@1 of both ways (`retrieval_scores`).

    On a mesh of several processes each calls it with the same records and gets the same numbers.

    Raises:
      MetricError: the dataset cannot be scored here.
    """
    if isinstance(model, Blip2):
        assert isinstance(text, CaptionTokenizer)
        chosen = [records[number] for number in pick_numbers(len(records), limit)]
        return retrieval_scores(model, params, text, chosen)
    assert isinstance(text, TextProcessor)
    blip = InstructBlipPipeline(
        model.variant, params, text, dtype=model.dtype, mesh=mesh, silent=True
    )
    kind, size = model.variant.llm.kind, max(1, batch_size // blip.batch_shards)
    if name := dataset_name(path) if path else "":
        task = open_task(
            get_benchmark(name, model.variant.kind), Path(path), kind, split=split, limit=limit
        )
    else:
        config = GenerationConfig(max_new_tokens=max_new_tokens)
        task = families.family_task(split or "validation", records, config, limit=limit)
    task = dataclasses.replace(task, style=style, upright=upright)
    questions = plan(task, blip.text, size)
    check_choices(task, questions.records)
    rows: list[Prediction] = []
    answering.answer(blip, task, questions, size=size, take=rows.extend)
    rows, scores, reason = score(task, rows, questions.records)
    if scores is None:
        raise MetricError(f"{path or 'what was given'} cannot validate: {reason}")
    if take_samples is not None:
        take_samples([dataclasses.asdict(rows[n]) for n in pick_numbers(len(rows), SAMPLES)])
    headline = next(iter(scores.values.values()))
    return {**scores.values, "score": headline}
