"""Divides a task's questions into batches whose content depends on the questions alone.

    records --plan--> groups of equal shapes --> units of `size` questions --> loads for workers

A device answers one unit at a time. All units of a group are padded to the same shapes, so one
compiled program answers them. Each question has a fixed position in its unit, so answers are
bit-identical for any number of devices and processes.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jax_instructblip.data.records import Record
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.evaluation.task import Task
from jax_instructblip.inference.batching import Example, padded_length, prompt_limit
from jax_instructblip.inference.ranking import Ids, Sizes, make_plan, same_tokens, tokenise

LOAD_UNITS = 8  # most units per device in a load
LOADS = 4  # least number of loads per worker, if there are enough units, to balance the workers


class Group(NamedTuple):
    """The padded shapes of a set of questions that one compiled program answers.

    Attributes:
      frames: number of images of a question, or of frames of its video.
      length: tokens to which prompt and Q-Former instruction are padded, without visual vectors.
      sizes: padded sizes of the candidates, in a ranking with candidates per question; else zeros.
    """

    frames: int
    length: int
    sizes: Sizes


class Unit(NamedTuple):
    """Questions that one device answers at once: at most `size` record numbers (`rows`)."""

    group: Group
    rows: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Questions:
    """All questions of a task, without their images.

    Attributes:
      records: all records, with "-" in place of each image.
      prompts: the prompt of each record.
      examples: record number -> prompt tokens, for records that can be asked.
      ids: candidate -> its tokens, for a ranking.
      alike: number of records with two different candidates of equal tokens.
      units: the questions that can be asked, in batches.
      problems: record number -> reason, for records that cannot be asked.
      cut: number of prompts too long for the Q-Former, which reads only their end.
      digest: identifies the content of the records, without images.
    """

    records: list[Record]
    prompts: list[str]
    examples: dict[int, Example]
    ids: dict[str, Ids]
    alike: int
    units: list[Unit]
    problems: dict[int, str]
    cut: int
    digest: str


def plan(
    task: Task, text: TextProcessor, size: int, tick: Callable[[], None] = lambda: None
) -> Questions:
    """Divides the questions of a task into units of `size`.

    `text` has the tokenizers of the model that answers; `tick` is called after each record is
    read. A record whose prompt is too long or cannot be built is listed in `Questions.problems`; it
    is no error.
    """
    if size < 1:
        raise ValueError(f"batch_size is {size}, expected at least 1")
    records, prompts, problems, cut = [], [], {}, 0
    digest = hashlib.sha256(task.digest.encode())
    shapes: dict[int, tuple[int, int]] = {}
    sizes: dict[int, Sizes] = {}
    known: dict[tuple[str, ...], Sizes] = {}
    examples: dict[int, Example] = {}
    ids: dict[str, Ids] = {}
    alike = longest = 0  # `longest`: most tokens of a candidate, if all questions share one list
    if _has_one_list(task):
        choices = list(task.choices(task.without_images(0)))
        longest = _longest(lists := tokenise(text, choices, 1, ids))
        alike = len(task.records) * bool(same_tokens([choices], lists))
    for number in range(len(task.records)):
        record = task.without_images(number)
        digest.update(repr(record).encode())
        records.append(record)
        tick()
        try:
            prompts.append(task.prompt(record))
        except ValueError as error:
            prompts.append("")
            problems[number] = str(error)
            continue
        try:
            _check_images(text, record)
            reserve = longest or task.settings.get("max_new_tokens", 0)
            if task.protocol.ranking and not longest:
                choices = task.choices(record)
                lists = tokenise(text, [list(choices)], 1, ids)
                reserve = _longest(lists)
                alike += bool(same_tokens([choices], lists))
                if choices not in known:
                    known[choices] = make_plan(lists).sizes
                sizes[number] = known[choices]
            examples[number] = text.prompt(prompts[-1], len(record.images))
            shapes[number] = padded_shape(text, examples[number], len(record.images), reserve)
            cut += int(examples[number]["truncated"][0])
        except ValueError as error:
            problems[number] = str(error)
    floors = _floors({number: sizes.get(number, Sizes()) for number in shapes})
    groups: dict[Group, list[int]] = collections.defaultdict(list)
    for number, shape in shapes.items():
        groups[Group(*shape, floors[number])].append(number)
    units = [
        Unit(group, tuple(groups[group][start : start + size]))
        for group in sorted(groups)
        for start in range(0, len(groups[group]), size)
    ]
    return Questions(
        *(records, prompts, examples, ids, alike, units, problems, cut, digest.hexdigest())
    )


def loads(units: Sequence[Unit], devices: int, workers: int) -> list[list[Unit]]:
    """Joins consecutive units of one group into loads; each of `workers` has `devices` devices.

    A load has at most `LOAD_UNITS` units per device, and fewer if there are few units.
    """
    share = max(1, len(units) // (workers * devices * LOADS))
    most = devices * min(share, LOAD_UNITS)
    parts: list[list[Unit]] = []
    for unit in units:
        if not parts or parts[-1][0].group != unit.group or len(parts[-1]) == most:
            parts.append([])
        parts[-1].append(unit)
    return parts


def places(load: Sequence[Unit], size: int, devices: int) -> Iterator[tuple[int, bool]]:
    """Yields (record number, is real) for each position of a load's batches.

    The batches have `size` questions on each of the `devices`. They are filled up by repeating the
    last record of a short unit and the last unit of a short load; these copies are not real.
    """
    filled = [*load, *[load[-1]] * (-len(load) % devices)]
    for index, unit in enumerate(filled):
        for position in range(size):
            real = index < len(load) and position < len(unit.rows)
            yield unit.rows[min(position, len(unit.rows) - 1)], real


def _check_images(text: TextProcessor, record: Record) -> None:
    """Raises a ValueError if the record has no image, and the model needs one."""
    if not record.images and text.variant.kind != "llava":
        raise ValueError(f"it has no image, which a model of kind {text.variant.kind} needs")


def _has_one_list(task: Task) -> bool:
    return task.protocol.ranking and bool(task.protocol.words or task.candidates)


def _longest(lists: Sequence[Sequence[Ids]]) -> int:
    return max(len(ids) for each in lists for ids in each)


def padded_shape(
    text: TextProcessor, example: Example, frames: int, reserve: int
) -> tuple[int, int]:
    """Returns `frames`, and the tokens to which a question's texts are padded.

    `frames` is the number of its images, whose visual vectors are not counted in the length.
    `reserve` tokens are kept free for the answer.

    Raises:
      ValueError: the prompt is too long.
    """
    count, limit = len(example["tokens"]), prompt_limit(text, frames, reserve)
    if count > limit:
        raise ValueError(f"the prompt has {count} tokens, the model holds {limit}: shorten it")
    longest = max(count, len(example.get("qformer_tokens", ())))
    return frames, padded_length(longest)


def _floors(sizes: dict[int, Sizes]) -> dict[int, Sizes]:
    """Returns the padded candidate sizes of each question: the largest of its size class."""
    classes: dict[int, Sizes] = {}
    kind = {number: _class(each) for number, each in sizes.items()}
    for number, each in sizes.items():
        largest = classes.get(kind[number], Sizes())
        classes[kind[number]] = Sizes(*map(max, largest, each))
    return {number: classes[kind[number]] for number in sizes}


def _class(sizes: Sizes) -> int:
    """Returns the size class: 0 for up to 16 tokens in all chunks, 1 up to 64, 2 up to 256, ..."""
    total, top, kind = sizes.chunks * sizes.inner, 16, 0
    while total > top:
        top, kind = 4 * top, kind + 1
    return kind
