"""The images and captions of a retrieval, and which caption belongs to which image."""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.answering import THREADS
from jax_instructblip.evaluation.metrics.metric import MetricError, listed
from jax_instructblip.evaluation.task import Task
from jax_instructblip.inference.batching import pixels


@dataclasses.dataclass(frozen=True)
class Gallery:
    """All images of a task and all captions, each of which belongs to one image.

    A caption that two images share stands twice, as in the released evaluation.

    Attributes:
      records: one for each image, with "-" in place of the image.
      captions: `M` texts as the model reads them, image by image.
      owner: `[M]` int32, the index in `records` of the image that each caption belongs to.
      names: `ID:NUMBER` for each caption: the id of its record, its number among its captions.
      digest: a sha256 of the records.
    """

    records: list[Record]
    captions: list[str]
    owner: np.ndarray
    names: list[str]
    digest: str


def read_gallery(task: Task) -> Gallery:
    """Returns the images and captions of the task's records.

    Raises:
      MetricError: there are no records, or one has no caption, an empty one, or not one image.
    """
    records = [task.without_images(number) for number in range(len(task.records))]
    digest = hashlib.sha256(task.digest.encode())
    captions, owner, names = [], [], []
    for number, record in enumerate(records):
        digest.update(repr(record).encode())
        for place, answer in enumerate(record.answers):
            captions.append(task.style.caption(answer))
            owner.append(number)
            names.append(f"{record.id}:{place}")
    empty = [name for name, text in zip(names, captions, strict=True) if not text.strip()]
    problems = [
        listed("images have no caption", [each.id for each in records if not each.answers]),
        listed("records are not of one image", [r.id for r in records if len(r.images) != 1]),
        listed("captions are empty as they are written", empty),
    ]
    if any(problems) or not records:
        said = "; ".join(filter(None, problems)) or "there are no records"
        raise MetricError(f"{task.name} ({task.split}) cannot be compared: {said}")
    return Gallery(records, captions, np.array(owner, np.int32), names, digest.hexdigest())


class Pictures(Sequence[np.ndarray]):
    """The image of each record as the model sees it, `[S, S, 3]` uint8, opened when asked for."""

    def __init__(self, task: Task, side: int, numbers: Sequence[int] | None = None):
        """Chooses the records with these `numbers`, by default all; `side` is `S` in pixels."""
        self._task, self._side = task, side
        self._numbers = range(len(task.records)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        """One image, or for a slice a list of images, which several threads open."""
        if not isinstance(index, slice):
            return self._open(self._numbers[index])
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(self._open, self._numbers[index]))

    def _open(self, number: int) -> np.ndarray:
        task, record = self._task, self._task.without_images(number)
        try:
            images = task.with_images(number).images
            return pixels(images, self._side, task.crop or "squash", task.upright)[0]
        except ValueError as error:
            raise ValueError(
                f"{task.name}: the image of {record.id} cannot be used, and every caption is "
                f"compared with it: {error}"
            ) from error


class Queries(Sequence[Record]):
    """The record of each query: queries are all `N` images, then all `M` captions.

    Item `n` < `N` is image `n`'s record; item `N + m` is the record that caption `m` belongs to.
    `records` and `owner` are those of a `Gallery`.
    """

    def __init__(self, records: Sequence[Record], owner: np.ndarray):
        self._records, self._owner = records, owner

    def __len__(self) -> int:
        return len(self._records) + len(self._owner)

    def __getitem__(self, index: Any) -> Any:
        count = len(self._records)
        return self._records[index if index < count else int(self._owner[index - count])]
