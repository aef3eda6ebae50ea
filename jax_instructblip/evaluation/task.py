"""A task: a protocol with its records and settings, ready to be asked."""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from jax_instructblip.data.datasets import get_dataset
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.prepare import builder, shards
from jax_instructblip.data.prepare.pictures import with_frames
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.records import Record, RecordSubset
from jax_instructblip.data.sources import prepared_folder
from jax_instructblip.data.templates import PAPER, TextStyle, format_prompt
from jax_instructblip.evaluation.metrics.metric import MetricError, listed
from jax_instructblip.evaluation.metrics.table import RANKED
from jax_instructblip.evaluation.protocol import Protocol

VIDEO_FRAMES = 4  # frames taken from an original video file


@dataclasses.dataclass(frozen=True)
class Task:
    """A protocol with its records, ready to be asked.

    Attributes:
      protocol: the protocol, with overrides applied.
      split: the dataset's split.
      records: the stored records, by number; read them by `with_images` or `without_images`.
      digest: identifies the content of the records' files.
      settings: keyword arguments of `blip.generate` or `blip.rank`.
      candidates: candidates that every record is ranked over; () if each has its own choices.
      videos: True if images are paths of video files.
      relevance: Visual Dialog's relevance of candidates, by record id (`read_relevance`).
      black: show black images, to measure what can be guessed from the question alone.
      style: how questions and dialogues are worded.
      crop: how images are cropped, a name of `images.CROPS`; "" means as the model's are.
      upright: rotate photographs as their EXIF data say.
      chat: the input format of a model that is asked by a chat template, which
        `for_input_format` sets.
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
    crop: str = ""
    upright: bool = True
    chat: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The protocol's name, used in files and results."""
        return self.protocol.name

    def for_input_format(self, form: InputFormat) -> "Task":
        """Returns the task as it is put to a model with that input format."""
        chat = form.to_dict() if form.template else {}
        return dataclasses.replace(self, crop=self.crop or form.image_crop, chat=chat)

    def with_images(self, number: int) -> Record:
        """Returns record `number` with its images; for a video, with `VIDEO_FRAMES` frames."""
        record = self.records[number]
        return with_frames(record, VIDEO_FRAMES) if self.videos else record

    def without_images(self, number: int) -> Record:
        """Returns record `number` with "-" in place of each image."""
        record = self.records[number]
        count = VIDEO_FRAMES if self.videos else len(record.images)
        return dataclasses.replace(record, images=("-",) * count, times=())

    def prompt(self, record: Record) -> str:
        """Returns the prompt for a record; `{answer}` is replaced by its first right answer."""
        return format_prompt(
            self.protocol.prompt, record, record.answers[0] if record.answers else "", self.style
        )

    def choices(self, record: Record) -> tuple[str, ...]:
        """Returns the texts to rank for a record: protocol words, shared candidates or choices."""
        if self.protocol.words:
            return tuple(word for words in self.protocol.words for word in words)
        return self.candidates or record.choices

    def facts(self) -> dict[str, Any]:
        """Returns what is asked and how, as JSON values; equal facts mean the same task."""
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
        if self.crop not in ("", "squash"):
            facts["crop"] = self.crop
        if self.chat:
            facts["chat"] = dict(self.chat)
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
    """Opens the records in `data` for a protocol; returns the task.

    Args:
      protocol: a protocol with a dataset.
      data: output of `jax-instructblip prepare` (the folder of all datasets or of this one), or
        the original files (directly, or in a folder with the dataset's name).
      llm: the kind of the language model (`variant.llm.kind`), on which some settings depend.
      split: the split; by default the protocol's.
      limit: number of records, always the same ones; 0: all.
      candidates: for a ranking over one list, candidates that replace those in `data`.
      overrides: fields as in `Protocol.override`.
      scoring: only right answers are needed, so files with other texts may be missing.

    Raises:
      ValueError: records, the split or the list of candidates are missing.
    """
    dataset = get_dataset(protocol.dataset)
    split = split or protocol.split or next(iter(dataset.files))
    records, digest, shared_candidates, videos = _open(dataset, data, split, scoring)
    protocol = protocol.override(overrides or {}, llm)
    if protocol.metric in RANKED and not (protocol.ranking or scoring):
        raise ValueError(
            f"{protocol.name} is scored by {protocol.metric}, which needs the scores of all "
            "candidates: leave out --mode generate"
        )
    if limit:
        records = RecordSubset(records, pick_numbers(len(records), limit))
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
    """Returns `limit` of the numbers below `count`, always the same ones, sorted; 0: all.

    They are random: if every n-th were taken, families could be missed when records of one image
    are adjacent.
    """
    if limit < 0:
        raise ValueError(f"limit is {limit}, expected 0 (all) or more")
    chosen = np.random.default_rng(0).permutation(count)[: min(limit or count, count)]
    return [int(number) for number in np.sort(chosen)]


def check_choices(task: Task, records: Sequence[Record]) -> None:
    """Raises a MetricError that lists records of a ranking that have no candidates."""
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
    """Returns records, digest of their files, shared candidates, and whether they are videos."""
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
