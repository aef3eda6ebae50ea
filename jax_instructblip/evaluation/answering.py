"""Runs the model on the questions of a task and returns its answers as rows of predictions."""

import concurrent.futures
import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jax_instructblip.evaluation.grouping import Questions, Unit, loads, places
from jax_instructblip.evaluation.metrics.choice_scores import class_scores
from jax_instructblip.evaluation.metrics.table import normalise_as
from jax_instructblip.evaluation.predictions import Prediction
from jax_instructblip.evaluation.task import Task
from jax_instructblip.inference import batching
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import InstructBlipPipeline

KEPT = 100  # most candidates that a row of a ranking keeps
THREADS = min(16, os.cpu_count() or 1)  # threads that decode images while the devices work


class Share(NamedTuple):
    """The part of the questions that this process answers: worker `index` of `count` workers."""

    index: int = 0
    count: int = 1


ALL = Share()


def answer(
    blip: InstructBlipPipeline,
    task: Task,
    questions: Questions,
    *,
    size: int,
    done: Collection[str] = (),
    share: Share = ALL,
    take: Callable[[list[Prediction]], None],
) -> None:
    """Answers this process's share of the questions that are not done; hands rows to `take`.

    Args:
      blip: the model.
      task: how the questions are asked.
      questions: all questions, planned by `grouping.plan` with the same `size`.
      size: questions that each device of `blip` answers at once.
      done: ids of records that are already answered.
      share: the part of this process. Worker 0 also hands over, for each question that cannot
        be asked, a row with its problem.
      take: called with lists of finished rows, in any order.
    """
    records, task = questions.records, task.for_input_format(blip.text.input_format)
    if share.index == 0:
        wanted = [n for n in sorted(questions.problems) if records[n].id not in done]
        if rows := [_problem(task, questions, n, questions.problems[n]) for n in wanted]:
            take(rows)
    left = [u for u in questions.units if any(records[n].id not in done for n in u.rows)]
    devices = blip.batch_shards
    mine = loads(left, devices, share.count)[share.index :: share.count]
    # Images of the next load are decoded while this one is answered.
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool, hushed():
        ahead = _start(pool, blip, task, mine[0]) if mine else {}
        for index, load in enumerate(mine):
            pixels_or_error = {number: future.result() for number, future in ahead.items()}
            ahead = _start(pool, blip, task, mine[index + 1]) if index + 1 < len(mine) else {}
            take(_answer_load(blip, task, questions, load, pixels_or_error, size, devices))


def count_left(questions: Questions, done: Collection[str]) -> int:
    """Returns the number of questions whose ids are not in `done`."""
    return sum(record.id not in done for record in questions.records)


def _start(
    pool: concurrent.futures.Executor, blip: InstructBlipPipeline, task: Task, load: Sequence[Unit]
) -> dict[int, concurrent.futures.Future[tuple[np.ndarray | None, str]]]:
    side = blip.variant.vision.image_size
    numbers = [number for unit in load for number in unit.rows]
    return {number: pool.submit(_open, task, number, side) for number in numbers}


def _open(task: Task, number: int, side: int) -> tuple[np.ndarray | None, str]:
    """Returns the pixels `[F, S, S, 3]` of a record's F images, or None and the reason."""
    count = len(task.without_images(number).images)
    if task.black or not count:
        return _black(count, side), ""
    try:
        return batching.pixels(task.with_images(number).images, side, task.crop, task.upright), ""
    except ValueError as error:
        return None, str(error)


def _black(frames: int, side: int) -> np.ndarray:
    return np.zeros((frames, side, side, 3), np.uint8)


def _answer_load(
    blip: InstructBlipPipeline,
    task: Task,
    questions: Questions,
    load: Sequence[Unit],
    pixels_or_error: dict[int, tuple[np.ndarray | None, str]],
    size: int,
    devices: int,
) -> list[Prediction]:
    side, group = blip.variant.vision.image_size, load[0].group
    order = list(places(load, size, devices))
    asked = []
    for number, _ in order:
        pixels = pixels_or_error[number][0]
        pixels = _black(group.frames, side) if pixels is None else pixels
        asked.append(
            batching.Question(pixels, questions.prompts[number], questions.examples[number])
        )
    batch = size * devices
    if task.protocol.ranking:
        one_list = bool(task.protocol.words or task.candidates)
        choices = [task.choices(questions.records[number]) for number, _ in order]
        scores = blip.rank_tokens(
            asked,
            [[questions.ids[each] for each in row] for row in choices[: 1 if one_list else None]],
            batch_size=batch,
            pad_to=None if one_list else group.sizes,
            **task.settings,
        )
        rows = [
            _ranked(task, questions, number, row[: len(names)])
            for (number, _), row, names in zip(order, scores, choices, strict=True)
        ]
    else:
        answers = blip.answer(asked, GenerationConfig.of(**task.settings), batch_size=batch)
        rows = [
            _prediction(task, questions, number, text=each.text, logprob=_number(each.logprob))
            for (number, _), each in zip(order, answers, strict=True)
        ]
    return [
        row
        if pixels_or_error[number][0] is not None
        else _problem(task, questions, number, pixels_or_error[number][1])
        for row, (number, real) in zip(rows, order, strict=True)
        if real
    ]


def _ranked(task: Task, questions: Questions, number: int, scores: np.ndarray) -> Prediction:
    record = questions.records[number]
    names = task.choices(record)
    if task.protocol.words:
        of_choices = class_scores([float(each) for each in scores], task.protocol.words)
        best = int(np.argmax(of_choices))
        text, logprob = record.choices[best], of_choices[best]
    else:
        best = int(np.argmax(scores))
        text, logprob = names[best], scores[best]
    order = range(len(names))
    if len(names) > KEPT:
        order = np.argsort(-scores, kind="stable")[:KEPT]
    return _prediction(
        task,
        questions,
        number,
        text=text,
        logprob=_number(logprob),
        candidates=tuple(names[index] for index in order),
        scores=tuple(_number(scores[index]) for index in order),
    )


def _problem(task: Task, questions: Questions, number: int, problem: str) -> Prediction:
    return _prediction(task, questions, number, problem=problem)


def _prediction(
    task: Task, questions: Questions, number: int, text: str = "", **fields
) -> Prediction:
    record = questions.records[number]
    return Prediction(
        id=record.id,
        task=record.task,
        prompt=questions.prompts[number],
        text=text,
        normalised=normalise_as(task.protocol.metric, text),
        answers=record.answers,
        **fields,
    )


def _number(value: float) -> float:
    """Returns the float with the fewest digits that still identify its float32 value."""
    return float(f"{value:.9g}")


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Silences the per-batch warning about prompts that are cut for the Q-Former.

    Their total number is in the results instead.
    """
    log = logging.getLogger(batching.__name__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
