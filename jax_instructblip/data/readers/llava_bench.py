"""LLaVA-Bench: open questions about images of COCO (30 x 3) and in the wild (24 images, 60).

    {"question_id": 0, "image": "000000441147.jpg", "text": "What ...?", "category": "conv"}

Answers are compared with reference answers by a judge, not by a metric. `raw` is the folder of the
original files; the only `split` is test.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from jax_instructblip.data.readers.annotations import (
    AnnotationError,
    field,
    pick_layout,
    read_json_lines,
    text_of,
    unique,
)
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.readers.named_files import PICTURES, NamedFiles
from jax_instructblip.data.records import Record

COCO, WILD = "llava_bench_coco", "llava_bench_wild"
CATEGORIES = ("conv", "detail", "complex")
LLAVA_COCO = {"test": ("qa90_questions.jsonl",)}
LLAVA_COCO_PAIRS = {"test": ("coco2014_val_gpt4_qa_30x3.jsonl",)}
LLAVA_WILD = {"test": ("questions.jsonl",)}
_COCO = "COCO_val2014_"  # begins the names of images
# The reference answers that may lie beside the questions.
_REFERENCES = {COCO: "qa90_gpt4_answer.jsonl", WILD: "answers_gpt4.jsonl"}


def read_coco(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields the 90 questions about COCO; the task is `llava_bench_coco/CATEGORY`.

    `answers` has the reference answer, if its file is there. In the older file of questions with
    answers, ids are row numbers. Images below `raw`: `val2014/COCO_val2014_000000441147.jpg`.
    """
    layout, (path,) = pick_layout(raw, split, LLAVA_COCO, LLAVA_COCO_PAIRS)
    if layout == 0:
        return unique(_questions(raw, path, split, COCO))
    return unique(_pairs(raw, path, split))


def read_wild(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields the 60 questions about images in the wild; the task is `llava_bench_wild/CATEGORY`.

    `answers` has the reference answer, if its file is there. Images below `raw`: `images/001.jpg`.
    """
    _, (path,) = pick_layout(raw, split, LLAVA_WILD)
    return unique(_questions(raw, path, split, WILD))


def _questions(raw: pathlib.Path, path: pathlib.Path, split: str, name: str) -> Iterator[Record]:
    references = _references(raw / _REFERENCES[name])
    pictures = NamedFiles(raw, PICTURES)
    for where, row in read_json_lines(path):
        key = str(field(row, "question_id", (int, str), where))
        yield Record(
            id=key,
            images=(_image(pictures, name, row, where),),
            prompt=text_of(row, "text", where),
            answers=(references[key],) if key in references else (),
            task=f"{name}/{_category(row, 'category', where)}",
            split=split,
        )


def _pairs(raw: pathlib.Path, path: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields the rows of the older file: `image`, `instruction`, `output`, `type`."""
    pictures = NamedFiles(raw, PICTURES)
    for number, (where, row) in enumerate(read_json_lines(path)):
        yield Record(
            id=str(number),
            images=(_image(pictures, COCO, row, where),),
            prompt=text_of(row, "instruction", where),
            answers=(text_of(row, "output", where),),
            task=f"{COCO}/{_category(row, 'type', where)}",
            split=split,
        )


def _image(pictures: NamedFiles, name: str, row: dict[str, Any], where: str) -> str:
    """Returns the path of a row's image; COCO's are written with or without `COCO_val2014_`."""
    image = text_of(row, "image", where)
    if name == WILD:
        return pictures.find("images", image, where=where)
    return pictures.find("val2014", f"{_COCO}{image.removeprefix(_COCO)}", where=where)


def _category(row: dict[str, Any], name: str, where: str) -> str:
    category = field(row, name, str, where)
    if category not in CATEGORIES:
        raise AnnotationError(
            f"{where}: {name} is {category!r}, expected one of {', '.join(CATEGORIES)}"
        )
    return category


def _references(path: pathlib.Path) -> dict[str, str]:
    """Returns the reference answers by question id; {} if the file is not there."""
    if not path.is_file():
        return {}
    return {
        str(field(row, "question_id", (int, str), where)): text_of(row, "text", where)
        for where, row in read_json_lines(path)
    }


def _dataset(name: str, **fields: Any) -> Dataset:
    return Dataset(
        name=name,
        family="visual conversational QA",
        held_in=False,
        templates="",
        source="https://github.com/haotian-liu/LLaVA (playground/data); in the wild: "
        "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
        **fields,
    )


DATASETS = (
    _dataset(
        COCO,
        read=read_coco,
        files=LLAVA_COCO,
        rerelease=LLAVA_COCO_PAIRS,
        counts={"test": 90},
        licence="Apache-2.0, and the terms of OpenAI (made by GPT-4); images: terms of Flickr",
        notes="30 images of COCO val2014 in val2014/, 3 questions each. Reference answers of "
        "qa90_gpt4_answer.jsonl are read if they are there. The other release is an older file of "
        "questions with their answers.",
    ),
    _dataset(
        WILD,
        read=read_wild,
        files=LLAVA_WILD,
        counts={"test": 60},
        licence="Apache-2.0; images: of several owners",
        notes="24 images in images/. Reference answers of answers_gpt4.jsonl are read if they are "
        "there.",
    ),
)
