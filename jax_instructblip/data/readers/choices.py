"""Questions with choices: A-OKVQA, ScienceQA, IconQA.

`split` is train, val or test; `raw` is the folder of the original files. A blank choice (A-OKVQA
val has one) is left out, and the index of the right choice is adjusted.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from jax_instructblip.data.readers.annotations import (
    AnnotationError,
    annotated,
    field,
    inside,
    pick_layout,
    read_json,
    require,
    text_of,
    texts_of,
    unique,
)
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.readers.named_files import PICTURES, NamedFiles
from jax_instructblip.data.readers.vqa import as_questions
from jax_instructblip.data.records import Record

_SPLITS = ("train", "val", "test")
AOKVQA = {split: (f"aokvqa_v1p0_{split}.json",) for split in _SPLITS}
SCIENCEQA = {split: ("problems.json",) for split in _SPLITS}
ICONQA = {split: (f"iconqa/{split}/choose_txt",) for split in _SPLITS}
ICONQA_LAVIS = {split: (f"annotations/{split}.json",) for split in _SPLITS}


def read_aokvqa(raw: pathlib.Path, split: str, task: str = "aokvqa") -> Iterator[Record]:
    """Yields A-OKVQA: `answers` are free answers of annotators, `choices` those of multiple choice.

    For test, answers and the right choice are hidden. Images below `raw` are those of COCO,
    `val2017/000000461751.jpg`, unless the row names another (as in LAVIS's files). `task` is the
    name that the records carry as their `task`.
    """
    _, (path,) = pick_layout(raw, split, AOKVQA)
    return unique(_aokvqa(raw, split, task, path))


def read_scienceqa(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields the problems of ScienceQA that have an image, without lectures and explanations.

    The prompt is the bare question, `context` the hint ("" if there is none), the one answer the
    text of the right choice. The annotation file is `problems.json`; images below `raw`:
    `images/test/4/image.png`.
    """
    _, (path,) = pick_layout(raw, split, SCIENCEQA)
    return unique(_scienceqa(raw, split, path))


def read_iconqa(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields IconQA's questions with text choices, from its own folders or from LAVIS's file.

    Images below `raw`: `iconqa/test/choose_txt/7/image.png`, or below `all_images` for LAVIS's
    file.
    """
    layout, (path,) = pick_layout(raw, split, ICONQA, ICONQA_LAVIS)
    if layout == 0:
        return unique(_iconqa(raw, split, path))
    return unique(_iconqa_lavis(raw, split, path))


def _aokvqa(raw: pathlib.Path, split: str, task: str, path: pathlib.Path) -> Iterator[Record]:
    """Yields the records of A-OKVQA's file, a JSON list of questions.

    A question has `question_id`, `image_id` (or `image`, a path), `question`, `choices` and, but
    for test, `correct_choice_idx` and `direct_answers`.
    """
    pictures = NamedFiles(raw, PICTURES)
    for number, row in enumerate(read_json(path, list)):
        name = text_of(require(row, dict, f"{path}: row {number}"), "question_id", f"{path}")
        where = f"{path}: question {name}"
        if "image" in row:
            image = text_of(row, "image", where)
        else:
            image = f"{split}2017/{field(row, 'image_id', int, where):012d}"
        choices, correct = _choose(row, None if split == "test" else "correct_choice_idx", where)
        yield Record(
            id=name,
            images=(pictures.find(image, usual=".jpg", where=where),),
            prompt=text_of(row, "question", where),
            task=task,
            split=split,
            choices=choices,
            correct=correct,
            **annotated(row, "direct_answers", where, hidden=split == "test"),
        )


def _scienceqa(raw: pathlib.Path, split: str, path: pathlib.Path) -> Iterator[Record]:
    """Yields the records of ScienceQA's file, a JSON object that has each problem by its id.

    A problem has `question`, `choices`, `answer` (an index), `hint`, `image` and `split`. Problems
    of other splits and those without an image are skipped.
    """
    for name, row in read_json(path, dict).items():
        where = f"{path}: problem {name}"
        if field(require(row, dict, where), "split", str, where) != split:
            continue
        if field(row, "image", (str, type(None)), where) is None:
            continue
        image = inside(raw, "images", split, name, text_of(row, "image", where), where=where)
        yield _choice(name, image, "scienceqa", split, row, where)


def _iconqa(raw: pathlib.Path, split: str, folder: pathlib.Path) -> Iterator[Record]:
    """Yields the records of the files `ID/data.json` in `folder`, in the order of ID."""
    problems = list(folder.glob("*/data.json"))
    if not problems:
        raise AnnotationError(f"{folder} has no folder with a data.json: unpack it again")
    pictures = NamedFiles(folder, PICTURES)
    for path in sorted(problems, key=lambda path: (len(path.parent.name), path.parent.name)):
        image = pictures.find(path.parent.name, "image", usual=".png")
        yield _choice(path.parent.name, image, "iconqa", split, read_json(path, dict), str(path))


def _iconqa_lavis(raw: pathlib.Path, split: str, path: pathlib.Path) -> Iterator[Record]:
    """Yields the records of LAVIS's file, a JSON list of questions; ids are row numbers.

    A question has `image`, `question`, `choices` and `answer`, an index.
    """
    for number, row in enumerate(read_json(path, list)):
        where = f"{path}: row {number}"
        name = text_of(require(row, dict, where), "image", where)
        image = inside(raw, "all_images", name, where=where)
        yield _choice(str(number), image, "iconqa", split, row, where)


def _choice(
    name: str, image: str, task: str, split: str, row: dict[str, Any], where: str
) -> Record:
    """Returns the record of a row: `question`, `choices`, `answer` (an index), optional `hint`."""
    choices, correct = _choose(row, "answer", where)
    return Record(
        id=name,
        images=(image,),
        prompt=text_of(row, "question", where),
        answers=(choices[correct],),
        task=task,
        split=split,
        choices=choices,
        correct=correct,
        context=field(row, "hint", str, where).strip() if "hint" in row else "",
    )


def index_of_choice(row: dict[str, Any], name: str, where: str) -> int:
    """Returns the field `name` of a row, the index of one of its `choices`.

    Raises:
        AnnotationError: it is no index of a choice; `where` names the row in the message.
    """
    index, count = field(row, name, int, where), len(row["choices"])
    if not 0 <= index < count:
        raise AnnotationError(
            f"{where}: {name} is {index}, expected the index of one of {count} choices"
        )
    return index


def _choose(row: dict[str, Any], name: str | None, where: str) -> tuple[tuple[str, ...], int]:
    """Returns the choices that are not blank, and the index of the right one among them.

    `name` is the field that holds the right index among all choices, blank ones included; None
    means that it is hidden, and the index is -1.
    """
    kept = texts_of(row, "choices", where)
    if name is None:
        return kept, -1
    choices, correct = row["choices"], index_of_choice(row, name, where)
    if not choices[correct].strip():
        raise AnnotationError(
            f"{where}: choice {correct}, the right one, is blank: correct the row or delete it"
        )
    return kept, sum(bool(choice.strip()) for choice in choices[:correct])


_AOKVQA = Dataset(
    name="aokvqa",
    family="knowledge-grounded image QA",
    held_in=True,
    read=read_aokvqa,
    files=AOKVQA,
    counts={"train": 17_056, "val": 1_145, "test": 6_702},
    templates="question",
    licence="Apache-2.0; images: terms of Flickr",
    source="https://github.com/allenai/aokvqa (aokvqa_v1p0.tar.gz); LAVIS: https://storage."
    "googleapis.com/sfr-vision-language-research/LAVIS/datasets/aokvqa/; images: "
    "https://cocodataset.org/#download",
    notes="Images in train2017/, val2017/ and test2017/; LAVIS's files, of the same names, "
    "say where. Multiple choice, which the paper ranks, is in choices and correct. Questions "
    "marked difficult_direct_answer are kept; the official direct-answer score leaves them out.",
)

DATASETS = (
    _AOKVQA,
    Dataset(
        name="scienceqa",
        family="knowledge-grounded image QA",
        held_in=False,
        read=read_scienceqa,
        files=SCIENCEQA,
        counts={"test": 2_017},
        templates="choice",
        licence="CC BY-NC-SA 4.0",
        source="https://github.com/lupantech/ScienceQA (data/scienceqa/problems.json, "
        "tools/download.sh for images)",
        notes="Problems with an image alone; images in images/SPLIT/ID/. Users of the released "
        "code stay 12 to 23 points below the paper; what is ranked, texts or letters, is not "
        "known.",
    ),
    Dataset(
        name="iconqa",
        family="visual reasoning",
        held_in=False,
        read=read_iconqa,
        files=ICONQA,
        rerelease=ICONQA_LAVIS,
        counts={"train": 18_946, "val": 6_316, "test": 6_316},
        templates="choice",
        licence="CC BY-NC-SA 4.0",
        source="https://iconqa2021.s3.us-west-1.amazonaws.com/iconqa_data.zip; LAVIS: "
        "https://storage.googleapis.com/sfr-xinstructblip-data-research/data/iconqa/"
        "annotations_{train,val,test}.json, kept as annotations/{train,val,test}.json",
        notes="Questions with choices of text alone. The folder iconqa of the archive stands "
        "here; LAVIS's images in all_images/.",
    ),
    as_questions(_AOKVQA, read_aokvqa),
)
