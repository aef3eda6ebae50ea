"""TextVQA and OCR-VQA: questions about text in images, with words from an OCR program.

`split` is train, val or test; `raw` is the folder of the original files.
"""

import dataclasses
import functools
import pathlib
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any

from jax_instructblip.data.readers.annotations import (
    AnnotationError,
    annotated,
    field,
    pick_layout,
    read_json,
    require,
    text_of,
    unique,
)
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.readers.named_files import PICTURES, NamedFiles
from jax_instructblip.data.readers.rosetta import read_rosetta
from jax_instructblip.data.readers.vqa import vqa_tool
from jax_instructblip.data.records import Record

TEXTVQA = {
    split: (f"TextVQA_0.5.1_{split}.json", f"TextVQA_Rosetta_OCR_v0.2_{split}.json")
    for split in ("train", "val", "test")
}
TEXTVQA_TOOLS = {
    split: (
        f"{split}_questions_vqa_format.json",
        f"TextVQA_Rosetta_OCR_v0.2_{split}.json",
        f"{split}_annotations_vqa_format.json",
    )
    for split in ("train", "val")
}
# The same without the files of Rosetta's words, which scoring does not need.
TEXTVQA_ANSWERS = (
    {split: files[:1] for split, files in TEXTVQA.items()},
    {split: files[::2] for split, files in TEXTVQA_TOOLS.items()},
)
OCRVQA_NUMBERS = {"train": 1, "val": 2, "test": 3}
OCRVQA = {split: ("dataset.json",) for split in OCRVQA_NUMBERS}
OCRVQA_LAVIS = {split: ("ocrvqa.json",) for split in OCRVQA_NUMBERS}


def read_textvqa(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields TextVQA with Rosetta's OCR words, from its own files or from files in VQAv2's layout.

    Images below `raw`: `train_images/003a8ae2ef43b901.jpg` for train and val, `test_images/...` for
    test, whose answers are not public.
    """
    layout, paths = pick_layout(raw, split, TEXTVQA, TEXTVQA_TOOLS)
    records = _textvqa_records(raw, split, layout, paths[::2])
    return unique(_with_words(records, paths[1]))


def read_textvqa_answers(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields TextVQA without Rosetta's OCR words: enough to score answers that were made before."""
    layout, paths = pick_layout(raw, split, *TEXTVQA_ANSWERS)
    return unique(_textvqa_records(raw, split, layout, paths))


def read_ocrvqa(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields OCR-VQA: the questions about each book cover, one after another.

    Images below `raw`: `images/KEY.jpg`, or with the ending that the cover's address (`imageURL`)
    has, or any other image ending. The dataset has no OCR words, and it is not known which ones
    InstructBLIP was given; your own may be in `ocr_tokens.json`, in the layout of Rosetta's files.
    A blank answer (a book without author) leaves the record without answers.
    """
    _, (path,) = pick_layout(raw, split, OCRVQA, OCRVQA_LAVIS)
    ocr = raw / "ocr_tokens.json"
    words = read_rosetta(ocr) if ocr.is_file() else {}
    pictures = NamedFiles(raw, PICTURES)
    for key, row in read_json(path, dict).items():
        where = f"{path}: {key}"
        number = field(require(row, dict, where), "split", int, where)
        if number not in OCRVQA_NUMBERS.values():
            raise AnnotationError(f"{where}: split is {number}, expected 1, 2 or 3")
        if number != OCRVQA_NUMBERS[split]:
            continue
        questions = field(row, "questions", list, where)
        answers = field(row, "answers", list, where)
        # The official download script keeps the ending of the address, which may not be `.jpg`.
        address = field(row, "imageURL", str, where) if "imageURL" in row else ""
        ending = pathlib.PurePosixPath(urllib.parse.urlsplit(address).path).suffix.lower()
        usual = ending if ending in PICTURES else ".jpg"
        image = pictures.find("images", key, usual=usual, where=where)
        if len(questions) != len(answers):
            raise AnnotationError(
                f"{where}: {len(questions)} questions and {len(answers)} answers, expected as many "
                "of both: correct the row or delete it"
            )
        for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            spot = f"{where}: [{index}]"
            pair = {"question": question, "answer": answer}
            yield Record(
                id=f"{key}:{index}",
                images=(image,),
                prompt=text_of(pair, "question", spot),
                answers=tuple(filter(str.strip, (field(pair, "answer", str, spot),))),
                task="ocrvqa",
                split=split,
                ocr=words.get(key, ()),
            )


def _with_words(records: Iterable[Record], path: pathlib.Path) -> Iterator[Record]:
    """Yields the records with the words that Rosetta read in their images.

    Raises:
        AnnotationError: the file has no entry for an image.
    """
    words = read_rosetta(path)
    for record in records:
        image = pathlib.PurePath(str(record.images[0])).stem
        # Raise: a question without OCR words is harder, and scores would fall by ten points.
        if image not in words:
            raise AnnotationError(
                f"question {record.id}: {path} has no words of image {image!r}: is it of another "
                "split?"
            )
        yield dataclasses.replace(record, ocr=words[image])


def _textvqa_records(
    raw: pathlib.Path, split: str, layout: int, paths: list[pathlib.Path]
) -> Iterator[Record]:
    """Yields the records of TextVQA's own file (layout 0) or of two files in VQAv2's layout (1)."""
    if layout == 0:
        return _textvqa(raw, split, paths[0])
    image = functools.partial(_textvqa_image, split)
    return vqa_tool(raw, split, "textvqa", paths, image)


def _textvqa(raw: pathlib.Path, split: str, path: pathlib.Path) -> Iterator[Record]:
    """Yields the records of TextVQA's own file, one for each row of its JSON list `data`.

    A row has `question_id`, `question`, `image_id` and, but for test, `answers`, ten texts.
    """
    pictures = NamedFiles(raw, PICTURES)
    for number, row in enumerate(field(read_json(path, dict), "data", list, str(path))):
        where = f"{path}: data[{number}]"
        row = require(row, dict, where)
        image = _textvqa_image(split, row, where)
        yield Record(
            id=str(field(row, "question_id", (int, str), where)),
            images=(pictures.find(image, usual=".jpg", where=where),),
            prompt=text_of(row, "question", where),
            task="textvqa",
            split=split,
            **annotated(row, "answers", where, hidden=split == "test"),
        )


def _textvqa_image(split: str, row: dict[str, Any], where: str) -> str:
    folder = "test_images" if split == "test" else "train_images"
    return f"{folder}/{text_of(row, 'image_id', where)}"


DATASETS: tuple[Dataset, ...] = (
    Dataset(
        name="textvqa",
        family="image QA with reading comprehension",
        held_in=False,
        read=read_textvqa,
        files=TEXTVQA,
        rerelease=TEXTVQA_TOOLS,
        read_answers=read_textvqa_answers,
        answer_files=TEXTVQA_ANSWERS,
        counts={"train": 34_602, "val": 5_000, "test": 5_734},
        templates="question",
        licence="CC BY 4.0 (annotations); images from Open Images, CC BY 2.0",
        source="https://textvqa.org/dataset (annotations, Rosetta OCR v0.2, train_val_images.zip)",
        notes="Images in train_images/ (train and val) and test_images/. Scored on val; test "
        "answers are not public. Without the words of Rosetta scores fall by about ten points. The "
        "other release is in the files of the VQA tools.",
    ),
    Dataset(
        name="ocrvqa",
        family="image QA with reading comprehension",
        held_in=True,
        read=read_ocrvqa,
        files=OCRVQA,
        rerelease=OCRVQA_LAVIS,
        counts={},
        templates="question",
        licence="UNVERIFIED (copies say Apache 2.0); book covers belong to their publishers",
        source="https://ocr-vqa.github.io (dataset.json and loadDataset.py, which fetches covers)",
        notes="Images in images/, KEY.jpg or KEY.gif. Many addresses of covers are dead: use an "
        "archive of them. About 798,250 training questions, 1,002,146 in all. UNVERIFIED: with "
        "which program InstructBLIP read the covers; ocr_tokens.json, in the layout of Rosetta's "
        "files, brings your own words.",
    ),
)
