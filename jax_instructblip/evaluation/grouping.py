"""The division of questions into those answered together, which depends on them alone.

    records --plan--> groups of one shape --> units of `size` questions --> loads for the workers

A device answers one unit at a time. All units of a group are padded alike, and each question has
its place in its unit, so an answer is the same to the last bit on however many devices and
processes, and a group is worked on by one compiled program.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jax_instructblip.data.records import Record
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.evaluation.task import Task
from jax_instructblip.inference.batching import LENGTHS, Example, prompt_limit
from jax_instructblip.inference.ranking import Ids, Sizes, make_plan, same_tokens, tokenise

LOAD_UNITS = 8  # units a device is given at once, at most
LOADS = 4  # a worker has at least, where there are units enough, so that all end together


class Group(NamedTuple):
    """Questions that one compiled program answers: its shapes."""

    frames: int
    length: int  # tokens that both texts are padded to
    sizes: Sizes  # of a ranking's candidates, where each question has its own


class Unit(NamedTuple):
    """Questions that a device answers at once: numbers of records, at most `size` of them."""

    group: Group
    rows: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Questions:
    """All questions of a task, without their images.

    Attributes:
      records: with "-" for each image.
      prompts: of each record.
      examples: the tokens of the prompts of those that can be asked, by number of the record.
      ids: the tokens of every candidate of a ranking.
      alike: how many records have different candidates of the same tokens.
      units: that can be asked.
      problems: number of a record that cannot be asked -> why.
      cut: how many prompts the Q-Former reads the end of alone.
      digest: stands for the records, images aside.
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
    """The questions of a task in units of `size`.

    `tick` is called for each record that was read. What is too long for the model, or must not be
    asked, is a problem of the record, not an error.
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
    alike = longest = 0  # `longest`: tokens of a candidate, where all questions have the same ones
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
            reserve = longest or task.settings.get("max_new_tokens", 0)
            if task.protocol.ranking and not longest:
                choices = task.choices(record)
                lists = tokenise(text, [list(choices)], 1, ids)
                reserve = _longest(lists)
                alike += bool(same_tokens([choices], lists))
                if choices not in known:
                    known[choices] = make_plan(lists).sizes
                sizes[number] = known[choices]
            examples[number] = text.prompt(prompts[-1])
            shapes[number] = _shape(text, examples[number], len(record.images), reserve)
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
    """The units in parts of one group each, of a few units for each of the devices of a worker."""
    share = max(1, len(units) // (workers * devices * LOADS))
    most = devices * min(share, LOAD_UNITS)
    parts: list[list[Unit]] = []
    for unit in units:
        if not parts or parts[-1][0].group != unit.group or len(parts[-1]) == most:
            parts.append([])
        parts[-1].append(unit)
    return parts


def places(load: Sequence[Unit], size: int, devices: int) -> Iterator[tuple[int, bool]]:
    """The record of each place of a load, and whether its answer counts.

    Units are filled up with their last record, the load with its last unit, to whole batches of
    `size` on each device.
    """
    filled = [*load, *[load[-1]] * (-len(load) % devices)]
    for index, unit in enumerate(filled):
        for position in range(size):
            real = index < len(load) and position < len(unit.rows)
            yield unit.rows[min(position, len(unit.rows) - 1)], real


def _has_one_list(task: Task) -> bool:
    return task.protocol.ranking and bool(task.protocol.words or task.candidates)


def _longest(lists: Sequence[Sequence[Ids]]) -> int:
    return max(len(ids) for each in lists for ids in each)


def _shape(text: TextProcessor, example: Example, frames: int, reserve: int) -> tuple[int, int]:
    """Frames and padded length of a question."""
    count, limit = len(example["tokens"]), prompt_limit(text.variant, frames, reserve)
    if count > limit:
        raise ValueError(f"the prompt has {count} tokens, the model holds {limit}: shorten it")
    longest = max(count, len(example.get("qformer_tokens", ())))
    return frames, next(each for each in LENGTHS if each >= longest)


def _floors(sizes: dict[int, Sizes]) -> dict[int, Sizes]:
    """The sizes that each question's candidates are padded to: the largest of their class."""
    classes: dict[int, Sizes] = {}
    kind = {number: _class(each) for number, each in sizes.items()}
    for number, each in sizes.items():
        largest = classes.get(kind[number], Sizes())
        classes[kind[number]] = Sizes(*map(max, largest, each))
    return {number: classes[kind[number]] for number in sizes}


def _class(sizes: Sizes) -> int:
    """The class of a size: 0 for up to 16 inner tokens, 1 for up to 64, 2 for up to 256 ..."""
    total, top, kind = sizes.chunks * sizes.inner, 16, 0
    while total > top:
        top, kind = 4 * top, kind + 1
    return kind
