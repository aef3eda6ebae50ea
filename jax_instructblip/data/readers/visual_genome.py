"""Visual Genome's questions, which BLIP-2's fine-tuning on questions reads beside VQAv2.

Its descriptions of regions, a dataset of pre-training, are in `pretraining.py`.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from jax_instructblip.data.readers.annotations import (
    AnnotationError,
    field,
    inside,
    pick_layout,
    read_json,
    require,
    text_of,
    unique,
)
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.records import Record

NAME = "visual_genome_questions"
QUESTIONS = {"train": ("question_answers.json", "image_data.json")}
QUESTIONS_LAVIS = {"train": ("vg_qa.json",)}


def read_questions(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields Visual Genome's questions, each with its one answer.

        question_answers.json    [{"id", "qas": [{"qa_id", "image_id", "question", "answer"}]}]
        image_data.json          [{"image_id", "url": ".../VG_100K_2/1.jpg"}]
        vg_qa.json (LAVIS)       [{"image": path below the folder, "question", "answer"}]

    `raw` is the folder of the original files; the only `split` is train. An image lies below `raw`
    in the folder that its URL names, `VG_100K` or `VG_100K_2`. A record whose question or answer is
    blank has that as its `problem`.

    Raises:
        AnnotationError: a file is missing or of another layout, or a question's image is not in
            image_data.json.
    """
    layout, paths = pick_layout(raw, split, QUESTIONS, QUESTIONS_LAVIS)
    rows = _official(raw, *paths) if layout == 0 else _lavis(raw, paths[0])
    return unique(_record(split, *row) for row in rows)


def _official(
    raw: pathlib.Path, path: pathlib.Path, pictures: pathlib.Path
) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """Yields (id, image, row, text for errors) of each question of the official files."""
    images = _images(raw, pictures)
    for number, group in enumerate(read_json(path, list)):
        where = f"{path}: row {number}"
        for index, row in enumerate(field(require(group, dict, where), "qas", list, where)):
            at = f"{where}: qas[{index}]"
            image = field(require(row, dict, at), "image_id", int, at)
            if image not in images:
                raise AnnotationError(
                    f"{at}: image {image} is not in {pictures}: get both files of one release"
                )
            yield str(field(row, "qa_id", int, at)), images[image], row, at


def _lavis(raw: pathlib.Path, path: pathlib.Path) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """Yields (id, image, row, text for errors) of each question of LAVIS's file."""
    for number, row in enumerate(read_json(path, list)):
        where = f"{path}: row {number}"
        image = text_of(require(row, dict, where), "image", where)
        yield str(number), inside(raw, image, where=where), row, where


def _images(raw: pathlib.Path, path: pathlib.Path) -> dict[int, str]:
    """Returns the file of each image by its number: the last two parts of its URL below `raw`."""
    images = {}
    for number, row in enumerate(read_json(path, list)):
        where = f"{path}: row {number}"
        url = text_of(require(row, dict, where), "url", where)
        parts = pathlib.PurePosixPath(url).parts[-2:]
        image, file = field(row, "image_id", int, where), inside(raw, *parts, where=where)
        if images.setdefault(image, file) != file:
            raise AnnotationError(
                f"{where}: image {image} is {file}, but was {images[image]} before"
            )
    return images


def _record(split: str, name: str, image: str, row: dict[str, Any], where: str) -> Record:
    question, answer = (field(row, key, str, where).strip() for key in ("question", "answer"))
    blank = " and ".join(
        key for key, text in (("question", question), ("answer", answer)) if not text
    )
    return Record(
        id=name,
        images=(image,),
        prompt=question,
        answers=(answer,) if answer else (),
        task=NAME,
        split=split,
        problem=f"its {blank} is blank" if blank else "",
    )


DATASETS = (
    Dataset(
        name=NAME,
        family="image QA",
        held_in=None,
        read=read_questions,
        files=QUESTIONS,
        rerelease=QUESTIONS_LAVIS,
        counts={},
        templates="blip2_question",
        licence="CC BY 4.0",
        source="https://homes.cs.washington.edu/~ranjay/visualgenome/api.html; vg_qa.json: "
        "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/datasets/visual_genome",
        notes="Images in VG_100K/ and VG_100K_2/, or where vg_qa.json says. Answers are as "
        "released: whole phrases with a full stop. There are about 1,445,000 questions.",
    ),
)
