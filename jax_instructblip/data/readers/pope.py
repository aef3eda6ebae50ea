"""POPE: questions whether an object is in an image of COCO, of three kinds.

The kinds differ in the objects that are asked about though they are absent: drawn at random, the
most frequent ones, or those that most often stand beside what is there. Released is a file of JSON
lines for each kind, with question ids that begin at 1; copies have brackets around the lines.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from jax_instructblip import files
from jax_instructblip.data.readers.annotations import (
    AnnotationError,
    field,
    pick_layout,
    read_lines,
    require,
    text_of,
    unique,
)
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.readers.named_files import PICTURES, NamedFiles
from jax_instructblip.data.records import Record

NAME = "pope"
# What LLaVA's question file adds to the question ids of each kind, so that all differ.
KINDS = {"random": 10_000_000, "popular": 20_000_000, "adversarial": 0}
ANSWERS = ("yes", "no")
_ALL = "test"  # the split of all three kinds


def _layout(folder: str = "") -> dict[str, tuple[str, ...]]:
    single = {kind: (f"{folder}coco_pope_{kind}.json",) for kind in KINDS}
    return {_ALL: tuple(name for names in single.values() for name in names), **single}


POPE, POPE_LLAVA = _layout(), _layout("coco/")


def read_pope(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields the questions of one kind, or of all three for the split "test".

    The kinds are the keys of `KINDS`, which are splits too. Ids are those of LLaVA's question file,
    the task is `pope/KIND`, and yes and no are the choices. Images below `raw`, the folder of the
    original files: `val2014/COCO_val2014_000000310196.jpg`.
    """
    _, paths = pick_layout(raw, split, POPE, POPE_LLAVA)
    kinds = list(KINDS) if split == _ALL else [split]
    pictures = NamedFiles(raw, PICTURES)
    return unique(
        record
        for kind, path in zip(kinds, paths, strict=True)
        for record in _questions(path, kind, split, pictures)
    )


def _questions(path: pathlib.Path, kind: str, split: str, pictures: NamedFiles) -> Iterator[Record]:
    """Yields the questions of a file: `question_id`, `image`, `text`, `label` (yes or no)."""
    for where, row in _rows(path):
        label = text_of(row, "label", where).lower()
        if label not in ANSWERS:
            raise AnnotationError(f"{where}: label is {label!r}, expected yes or no")
        yield Record(
            id=str(KINDS[kind] + field(row, "question_id", int, where)),
            images=(pictures.find("val2014", text_of(row, "image", where), where=where),),
            prompt=text_of(row, "text", where),
            answers=(label,),
            task=f"{NAME}/{kind}",
            split=split,
            choices=ANSWERS,
            correct=ANSWERS.index(label),
        )


def _rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (`FILE:LINE`, row); lines may be elements of a list, with or without commas."""
    for number, line in enumerate(read_lines(path), start=1):
        where, text = f"{path}:{number}", line.strip().strip("[],")
        if not text:
            continue
        try:
            row = files.parse_json(text.encode())
        except ValueError as error:
            raise AnnotationError(
                f"{where}: {error}; the file may be damaged or cut off: get it again"
            ) from error
        yield where, require(row, dict, where)


DATASETS = (
    Dataset(
        name=NAME,
        family="image QA",
        held_in=False,
        read=read_pope,
        files=POPE,
        rerelease=POPE_LLAVA,
        counts={_ALL: 8_910, "random": 2_910, "popular": 3_000, "adversarial": 3_000},
        templates="question",
        licence="MIT; images: terms of Flickr",
        source="https://github.com/RUCAIBox/POPE (output/coco/); images: COCO val2014, "
        "https://cocodataset.org/#download",
        notes="Images in val2014/. Split test is all three kinds; ids are those of LLaVA's "
        "question file, so its answers are scored as they are. The other release is LLaVA's "
        "folder (coco/). Later copies of random have 3,000 questions.",
    ),
)
