"""From records to answers to exact match by task family, beside what guessing reaches."""

import collections
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_instructblip.data.images import decode, resize_squash
from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.exact_match import is_correct, majority_answer
from jax_instructblip.evaluation.task import pick_numbers
from jax_instructblip.folders import write_file
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.inference.questions import prompt_limit

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


class Measured(NamedTuple):
    """What a model reaches on some records.

    Attributes:
      scores: {"count": n, "mean": {"tuned": share, "blind": ...}, "tasks": {family: {"count": n,
        "tuned": share, ...}}, "problems": [line, ...]}, as in `results.json`.
      predictions: in the order of the records.
    """

    scores: dict[str, Any]
    predictions: list[Prediction]


def measure(
    blip: InstructBlipPipeline,
    records: Sequence[Record],
    *,
    before: InstructBlipPipeline | None = None,
    blind: bool = True,
    batch_size: int = 64,
    max_new_tokens: int = 30,
) -> Measured:
    """Accuracies by family of `blip` (`tuned`), of the best constant answer (`majority`), and more.

    With `blind`, also those of the same model shown black images; with `before`, those of the model
    that it was tuned from. The other arguments are those of `answer`.
    """
    ask = functools.partial(answer, batch_size=batch_size, max_new_tokens=max_new_tokens)
    predictions = ask(blip, records)
    columns = {"tuned": accuracies(predictions), "majority": majority_accuracies(predictions)}
    if blind:
        columns["blind"] = accuracies(ask(blip, records, blind=True))
    if before is not None:
        columns["before"] = accuracies(ask(before, records))
    counts = collections.Counter(prediction.task for prediction in predictions)
    scores = {
        "count": len(records),
        "mean": {name: mean(values) for name, values in columns.items()},
        "tasks": {
            task: {
                "count": counts[task],
                **{name: values[task] for name, values in columns.items()},
            }
            for task in sorted(counts)
        },
        "problems": [f"{each.id}: {each.problem}" for each in predictions if each.problem],
    }
    return Measured(scores, predictions)


def table(split: str, scores: dict[str, Any]) -> str:
    """The scores of a split as lines to print, and what could not be asked."""
    columns = list(scores["mean"])
    width = max(len("mean of the families"), *map(len, scores["tasks"]))
    lines = [f"\n{split:{width}}  questions  " + "  ".join(f"{name:>8}" for name in columns)]
    rows = {**scores["tasks"], "mean of the families": {"count": scores["count"], **scores["mean"]}}
    for name, values in rows.items():
        cells = "  ".join(f"{values[column]:8.1%}" for column in columns)
        lines.append(f"{name:{width}}  {values['count']:9}  {cells}")
    for problem in scores["problems"]:
        lines.append(f"could not be asked: {problem}")
    return "\n".join(lines)


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
