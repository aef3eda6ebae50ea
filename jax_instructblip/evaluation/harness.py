"""From records to answers to accuracies, by task family."""

import collections
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_instructblip.data.images import decode, resize_squash
from jax_instructblip.data.records import Record
from jax_instructblip.data.sources import dataset_name
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.evaluation.answering import answer as answer_task
from jax_instructblip.evaluation.benchmarks import BENCHMARKS, Benchmark
from jax_instructblip.evaluation.exact_match import is_correct, majority_answer
from jax_instructblip.evaluation.metric import MetricError
from jax_instructblip.evaluation.scoring import score
from jax_instructblip.evaluation.stored import Row
from jax_instructblip.evaluation.task import check_choices, open_task, pick_numbers
from jax_instructblip.evaluation.units import plan
from jax_instructblip.folders import write_file
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.inference.questions import prompt_limit
from jax_instructblip.models.instructblip import InstructBlip

CHUNK_BATCHES = 8  # batches whose images are in memory at once
NO_TASK = "all"  # the family of records that name none


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An answer, and what it should have been.

    Attributes:
      text: as generated; empty where the question could not be asked.
      logprob: of `text`, natural logarithm.
      problem: why the question could not be asked (then it counts as answered wrongly).
    """

    id: str
    task: str
    prompt: str
    text: str
    answers: tuple[str, ...]
    logprob: float
    correct: bool
    problem: str = ""


def evaluate(
    *,
    model: InstructBlip,
    params: dict[str, Any],
    text: TextProcessor,
    records: Sequence[Record],
    mesh: Mesh | None = None,
    limit: int = 0,
    batch_size: int = 64,
    max_new_tokens: int = 30,
    path: str = "",
    split: str = "",
) -> dict[str, float]:
    """`accuracy`, by which a run chooses its best checkpoint, and what else there is to say.

    Of a folder `path` that `jax-instructblip prepare` wrote, `accuracy` is the value of the
    dataset's own metric (of captions CIDEr), with the prompt and the settings of its preset, and
    the other values follow by name. Of other records it is exact match of whole answers, the mean
    over the task families, with `accuracy/FAMILY`. `limit` questions are taken; 0 takes all.

    On a mesh of several processes each calls it with the same records and gets the same numbers.

    Raises:
      MetricError: the dataset cannot be scored here.
    """
    silent = jax.process_index() > 0
    blip = InstructBlipPipeline(
        model.variant, params, text, dtype=model.dtype, mesh=mesh, silent=silent
    )
    if name := dataset_name(path) if path else "":
        return _benchmark(blip, BENCHMARKS[name], Path(path), split, limit, batch_size)
    predictions = answer(
        blip, pick(records, limit), batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    by_task = accuracies(predictions)
    return {
        "accuracy": mean(by_task),
        **{f"accuracy/{task}": value for task, value in by_task.items()},
    }


def _benchmark(
    blip: InstructBlipPipeline,
    benchmark: Benchmark,
    path: Path,
    split: str,
    limit: int,
    batch_size: int,
) -> dict[str, float]:
    task = open_task(benchmark, path, blip.variant.llm.kind, split=split, limit=limit)
    size = max(1, batch_size // blip.splits)
    questions = plan(task, blip.text, size)
    check_choices(task, questions.records)
    rows: list[Row] = []
    blip.silent = True
    answer_task(blip, task, questions, size=size, take=rows.extend)
    _, scores, reason = score(task, rows, questions.records)
    if scores is None:
        raise MetricError(f"{path} cannot validate: {reason}")
    main = next(iter(scores.values.values()))
    return {"accuracy": main, **scores.values}


def pick(records: Sequence[Record], limit: int) -> list[Record]:
    """`limit` of the records, always the same ones, in their order; all of them for 0."""
    return [records[number] for number in pick_numbers(len(records), limit)]


def answer(
    blip: InstructBlipPipeline,
    records: Sequence[Record],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 30,
    blind: bool = False,
) -> list[Prediction]:
    """A greedy answer to each record's prompt, in order.

    `blind` shows black images instead: what is right then was guessed from the question. A record
    whose image or prompt cannot be used is answered with nothing, and wrong.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    found: dict[int, Prediction] = {}
    for chunk in _chunks(records, batch_size * CHUNK_BATCHES):
        asked, images = [], []
        for index in chunk:
            try:
                frames = _frames(blip, records[index], blind)
                _check_prompt(blip, records[index], max_new_tokens)
            except ValueError as error:
                found[index] = _prediction(records[index], "", 0.0, problem=str(error))
                continue
            asked.append(index)
            images.append(frames)
        if not asked:
            continue
        given = blip.generate(
            images,
            [records[index].prompt for index in asked],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        for index, each in zip(asked, given, strict=True):
            found[index] = _prediction(records[index], each.text, each.logprob)
    return [found[index] for index in range(len(records))]


def accuracies(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The share of right answers of each task family, in alphabetical order."""
    by_task = collections.defaultdict(list)
    for prediction in predictions:
        by_task[prediction.task].append(prediction.correct)
    return {task: float(np.mean(by_task[task])) for task in sorted(by_task)}


def majority_accuracies(predictions: Sequence[Prediction]) -> dict[str, float]:
    """What the best constant answer of each family would reach on the same questions."""
    by_task = collections.defaultdict(list)
    for prediction in predictions:
        by_task[prediction.task].append(prediction.answers)
    return {
        task: float(np.mean([is_correct(majority_answer(truths), each) for each in truths]))
        for task, truths in sorted(by_task.items())
    }


def mean(values: dict[str, float]) -> float:
    """The mean over families, each counting alike."""
    return float(np.mean(list(values.values())))


def write_predictions(path: str | os.PathLike, predictions: Sequence[Prediction]) -> None:
    """Writes them as JSON lines, the file appearing whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(dataclasses.asdict(each), ensure_ascii=False) for each in predictions)
    write_file(path, "".join(line + "\n" for line in lines))


def _chunks(records: Sequence[Record], size: int) -> Iterator[list[int]]:
    """Numbers of records to ask together: equally many frames, at most `size`."""
    frames = [len(record.images) for record in records]
    order = sorted(range(len(records)), key=frames.__getitem__)
    for _, same in itertools.groupby(order, key=frames.__getitem__):
        numbers = list(same)
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


def _frames(blip: InstructBlipPipeline, record: Record, blind: bool) -> list[np.ndarray]:
    size = blip.variant.vision.image_size
    if not record.answers:
        raise ValueError("the record has no answer to compare with")
    if blind:
        return [np.zeros((size, size, 3), np.uint8) for _ in record.images]
    return [resize_squash(decode(image), size) for image in record.images]


def _check_prompt(blip: InstructBlipPipeline, record: Record, room: int) -> None:
    """Raises a ValueError where the prompt cannot be asked."""
    count = len(blip.text.prompt(record.prompt)["tokens"])
    limit = prompt_limit(blip.variant, len(record.images), room)
    if count > limit:
        raise ValueError(f"the prompt has {count} tokens, the model holds {limit}: shorten it")


def _prediction(record: Record, text: str, logprob: float, problem: str = "") -> Prediction:
    return Prediction(
        id=record.id,
        task=record.task or NO_TASK,
        prompt=record.prompt,
        text=text,
        answers=record.answers,
        logprob=logprob,
        correct=not problem and is_correct(text, record.answers),
        problem=problem,
    )
