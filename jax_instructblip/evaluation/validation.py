"""Validation during training: the scores by which a run chooses its best checkpoint."""

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
from jax_instructblip.evaluation.by_kind import INSTRUCTBLIP, get_benchmark
from jax_instructblip.evaluation.grouping import plan
from jax_instructblip.evaluation.metrics import caption_scores
from jax_instructblip.evaluation.metrics.metric import MetricError
from jax_instructblip.evaluation.predictions import Prediction
from jax_instructblip.evaluation.retrieval_scores import retrieval_scores
from jax_instructblip.evaluation.scoring import HIDDEN, NO_METRIC, is_known, score
from jax_instructblip.evaluation.task import check_choices, open_task, pick_numbers
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.models.blip2 import Blip2
from jax_instructblip.models.vlm import VisionLanguageModel

SAMPLES = 8  # answers handed to `take_samples`
_LOOKED_AT = 64  # records that `check` reads; at least one must have a right answer


def check(records: Sequence[Record], path: str, split: str) -> None:
    """Checks, before training starts, that the validation records can be scored.

    `path` and `split` say where the records are from.

    Raises:
      MetricError: the dataset has no metric, no public answers, or its tools are missing.
    """
    name = dataset_name(path)
    # Datasets of pre-training have no protocol; they are scored like a JSON-lines file.
    metric = INSTRUCTBLIP[name].metric if name in INSTRUCTBLIP else families.METRIC
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
    prompt: str = "",
    style: TextStyle = PAPER,
    upright: bool = True,
    take_samples: Callable[[list[dict[str, Any]]], None] | None = None,
) -> dict[str, float]:
    """Returns validation scores by name: the headline metric first, `score` last.

    `score` repeats the headline under a name that every run has; the best checkpoint is the one
    with the highest `score`. The headline is

    - for a folder `path` written by `jax-instructblip prepare`: the dataset's own metric, asked by
      its protocol (CIDEr for captions);
    - for other records: `accuracy`, exact match averaged over the families of questions, and then
      `accuracy/FAMILY` for each;
    - for BLIP-2's first stage: `recall`, the mean R@1 of both directions (`retrieval_scores`).

    Questions of such a folder are read from there, from its `split` ("": the protocol's); a first
    stage and other data are measured on `records`. `limit` of them are taken, 0 means all;
    `batch_size` at once, on all devices together. Without a protocol answers have at most
    `max_new_tokens`. `prompt` replaces the protocol's prompt, or the bare question of other
    records. `take_samples` is called with a few prediction rows (fields of `Prediction`), always of
    the same questions. `style` and `upright` should be those of training: how texts are worded, and
    whether photographs are rotated by EXIF. In a multi-process run each process calls this with the
    same records and gets the same numbers.

    Raises:
      MetricError: the records cannot be scored.
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
    if path and (name := dataset_name(path)) in INSTRUCTBLIP:
        overrides = {"prompt": prompt} if prompt else {}
        task = open_task(
            *(get_benchmark(name, model.variant.kind), Path(path), kind),
            split=split,
            limit=limit,
            overrides=overrides,
        )
    else:
        config = GenerationConfig(max_new_tokens=max_new_tokens)
        task = families.family_task(
            split or "validation", records, config, limit=limit, prompt=prompt or "{question}"
        )
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
