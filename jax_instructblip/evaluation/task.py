"""A protocol made ready: its records, what is asked of each, and how it is answered."""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.prepare import builder, shards
from jax_instructblip.data.prepare.pictures import with_frames
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.records import Record
from jax_instructblip.data.sources import prepared_folder
from jax_instructblip.data.templates import PAPER, TextStyle, format_prompt
from jax_instructblip.evaluation.metrics.metric import MetricError, listed
from jax_instructblip.evaluation.metrics.table import RANKED
from jax_instructblip.evaluation.protocol import Protocol

VIDEO_FRAMES = 4  # of a video that is read as it was downloaded


@dataclasses.dataclass(frozen=True)
class Task:
    """One protocol, ready to be asked.

    Attributes:
      protocol: its row of the table, with what was overridden.
      split: of its dataset.
      records: with random access, as they are stored; `with_images` and `without_images` give them.
      digest: stands for the content of the records' files.
      settings: keyword arguments of `blip.generate`, or of `blip.rank`.
      candidates: that every record is ranked over; () where records have their own choices.
      videos: whether images are paths of video files.
      relevance: of Visual Dialog the judgements of candidates, by id (`read_relevance`).
      black: whether black images are shown: what is right then was guessed from the question.
      style: how questions and dialogues are written.
      crop: what is seen of an image, a name of `images.CROPS`.
      upright: whether photographs are turned as their EXIF says.
    """

    protocol: Protocol
    split: str
    records: Sequence[Record]
    digest: str
    settings: Mapping[str, Any]
    candidates: tuple[str, ...] = ()
    videos: bool = False
    relevance: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    black: bool = False
    style: TextStyle = PAPER
    crop: str = "squash"
    upright: bool = True

    @property
    def name(self) -> str:
        """The name in files and results."""
        return self.protocol.name

    def with_images(self, number: int) -> Record:
        """The record with its images, of a video with some of its frames."""
        record = self.records[number]
        return with_frames(record, VIDEO_FRAMES) if self.videos else record

    def without_images(self, number: int) -> Record:
        """The record with "-" for each image."""
        record = self.records[number]
        count = VIDEO_FRAMES if self.videos else len(record.images)
        return dataclasses.replace(record, images=("-",) * count, times=())

    def prompt(self, record: Record) -> str:
        """The prompt about the record; where it asks for a question, it has the first answer."""
        return format_prompt(
            self.protocol.prompt, record, record.answers[0] if record.answers else "", self.style
        )

    def choices(self, record: Record) -> tuple[str, ...]:
        """The candidates of a ranking."""
        if self.protocol.words:
            return tuple(word for words in self.protocol.words for word in words)
        return self.candidates or record.choices

    def facts(self) -> dict[str, Any]:
        """The facts of the questions: what is asked and how, for people and to compare two runs."""
        facts: dict[str, Any] = {
            "dataset": self.protocol.dataset,
            "split": self.split,
            "mode": self.protocol.mode,
            "prompt": self.protocol.prompt,
            "settings": dict(self.settings),
        }
        if self.black:
            facts["images"] = "black"
        if self.style != PAPER:
            facts["style"] = dataclasses.asdict(self.style)
        if self.crop != "squash":
            facts["crop"] = self.crop
        if not self.upright:
            facts["exif"] = "ignored"
        if self.protocol.ranking and self.protocol.words:
            facts["words"] = [list(words) for words in self.protocol.words]
        if self.candidates:
            text = json.dumps(self.candidates).encode()
            facts["candidates"] = {
                "count": len(self.candidates),
                "sha256": hashlib.sha256(text).hexdigest(),
            }
        return facts


class Chosen(Sequence[Record]):
    """Some of the records, read when they are asked for."""

    def __init__(self, records: Sequence[Record], numbers: Sequence[int]):
        self._records, self._numbers = records, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return self._records[int(self._numbers[index])]


def open_task(
    protocol: Protocol,
    data: Path,
    llm: str,
    *,
    split: str = "",
    limit: int = 0,
    candidates: tuple[str, ...] = (),
    overrides: Mapping[str, Any] | None = None,
    scoring: bool = False,
) -> Task:
    """The task of a protocol whose records lie in `data`.

    Args:
      protocol: what to evaluate, a row with a dataset.
      data: what `jax-instructblip prepare` wrote (the folder of all datasets or of this one), or
        the files as they were downloaded (in a folder of the dataset's name, or alone).
      llm: the kind of the language model, which some settings depend on.
      split: another than the protocol's.
      limit: so many of the records, always the same ones; 0: all.
      candidates: that a ranking over one list for all records takes, instead of those that
        `prepare` found.
      overrides: what `Protocol.override` takes.
      scoring: only right answers are needed, so that files which a prompt takes may be missing.

    Raises:
      ValueError: there are no such records, there is no such split, or candidates are missing.
    """
    dataset = DATASETS[protocol.dataset]
    split = split or protocol.split or next(iter(dataset.files))
    records, digest, shared_candidates, videos = _open(dataset, data, split, scoring)
    protocol = protocol.override(overrides or {}, llm)
    if protocol.metric in RANKED and not (protocol.ranking or scoring):
        raise ValueError(
            f"{protocol.name} is scored by {protocol.metric}, which needs the scores of all "
            "candidates: leave out --mode generate"
        )
    if limit:
        records = Chosen(records, pick_numbers(len(records), limit))
    shared = dataset.shared_candidates and protocol.ranking
    candidates = (candidates or shared_candidates) if shared else ()
    if shared and not candidates:
        raise ValueError(
            f"{protocol.name} is ranked over one list of candidates, and {data} has none: put "
            "qa_ans2label.json (or train_ans2label.json) beside the original files and prepare "
            "them again, give a file with --candidates, or generate answers with --mode generate"
        )
    return Task(protocol, split, records, digest, protocol.settings(), candidates, videos)


def pick_numbers(count: int, limit: int) -> list[int]:
    """`limit` of `count` numbers, always the same ones, in their order; all of them for 0.

    They are drawn at random: every n-th would meet only some of the families where records of one
    image follow each other.
    """
    if limit < 0:
        raise ValueError(f"limit is {limit}, expected 0 (all) or more")
    chosen = np.random.default_rng(0).permutation(count)[: min(limit or count, count)]
    return [int(number) for number in np.sort(chosen)]


def check_choices(task: Task, records: Sequence[Record]) -> None:
    """Raises a ValueError that lists the records of a ranking that have nothing to choose among."""
    if not task.protocol.ranking or task.protocol.words or task.candidates:
        return
    if lacking := [record.id for record in records if not record.choices]:
        raise MetricError(
            f"{task.name} is ranked, but "
            + listed("records have no candidates (`choices`)", lacking)
            + "; prepare them again from files that have them"
            + ("" if task.protocol.metric in RANKED else ", or use --mode generate")
        )


def _open(
    dataset: Dataset, data: Path, split: str, scoring: bool
) -> tuple[Sequence[Record], str, tuple[str, ...], bool]:
    """Records, the digest of their files, the candidates beside them, whether they are videos."""
    for directory in (data / dataset.name, data):
        folder = prepared_folder(directory)
        if folder is None:
            continue
        report = shards.read_report(folder)
        if report["name"] != dataset.name:
            continue
        records = cast(Sequence[Record], builder.open_folder(folder, split))
        digest = hashlib.sha256((folder / shards.REPORT).read_bytes()).hexdigest()
        return records, digest, shards.read_candidates(folder), False
    for directory in (data / dataset.name, data):
        if directory.is_dir() and split in dataset.present(directory):
            rows = list(dataset.read(directory, split))
            videos = dataset.family == shards.VIDEO
            return rows, "", shards.raw_candidates(dataset, directory), videos
        if scoring and dataset.read_answers and split in dataset.scorable(directory):
            return list(dataset.read_answers(directory, split)), "", (), False
    there = sorted(each.name for each in data.iterdir()) if data.is_dir() else []
    near = difflib.get_close_matches(dataset.name, there, n=1)
    files = " and ".join(dataset.files.get(split, ("?",)))
    raise ValueError(
        f"no records of {dataset.name} ({split}) in {data}: found {', '.join(there[:12]) or '-'}"
        + (f" (is {near[0]} meant?)" if near else "")
        + f"; expected {dataset.name}/{shards.VERSION}, as `jax-instructblip prepare` writes it, "
        f"or its files as they were downloaded ({files}; splits: {', '.join(dataset.files)})"
    )
