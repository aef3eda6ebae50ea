"""Questions with free answers (VQAv2, OK-VQA, VizWiz), and datasets for question generation.

`vqa_tool` reads the file layout of the VQA tools (the official scripts of VQAv2), which many
datasets use. A record has one answer for each annotator, in their order; blank answers are only
counted (`Record.blank`). `raw` is the folder of the original files, `split` a key of the dataset's
table (`VQAV2`, `OKVQA`, `VIZWIZ`); `task` is the `task` of the records.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
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
    unique,
)
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.readers.named_files import PICTURES, NamedFiles
from jax_instructblip.data.records import Record

VQAV2 = {
    "train": (
        "v2_OpenEnded_mscoco_train2014_questions.json",
        "v2_mscoco_train2014_annotations.json",
    ),
    "val": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
    "testdev": ("v2_OpenEnded_mscoco_test-dev2015_questions.json",),
    "test": ("v2_OpenEnded_mscoco_test2015_questions.json",),
}
VQAV2_LAVIS = {split: (f"vqa_{split}.json",) for split in ("train", "val")}
OKVQA = {
    split: (
        f"OpenEnded_mscoco_{split}2014_questions.json",
        f"mscoco_{split}2014_annotations.json",
    )
    for split in ("train", "val")
}
OKVQA_LAVIS = {"train": ("okvqa_train.json",)}
VIZWIZ = {split: (f"Annotations/{split}.json",) for split in ("train", "val", "test")}
VIZWIZ_TOOL = {
    split: (f"{split}_questions_vqa_format.json", f"{split}_annotations_vqa_format.json")
    for split in ("train", "val")
}


def vqa_tool(
    raw: pathlib.Path,
    split: str,
    task: str,
    paths: list[pathlib.Path],
    image: Callable[[dict[str, Any], str], str],
) -> Iterator[Record]:
    """Yields the records of a question file and an annotation file in VQAv2's layout.

        {"questions": [{"question_id", "image_id", "question"}]}
        {"annotations": [{"question_id", "answers": [{"answer"}]}]}

    Args:
      raw: the folder of the dataset.
      split: the split of the records.
      task: the `task` of the records, such as "vqav2".
      paths: the question file and the annotation file; the latter is missing if answers are hidden.
      image: function of (row of a question, text for errors) that returns the image's path below
        `raw`.

    Raises:
      AnnotationError: a question has no annotation, or an annotation no question.
    """
    answers = _tool_answers(paths[1]) if len(paths) > 1 else None
    asked, pictures = set(), NamedFiles(raw, PICTURES)
    for row in _rows(paths[0], "questions"):
        name = _number(row, "question_id", str(paths[0]))
        where = f"{paths[0]}: question {name}"
        asked.add(name)
        if answers is not None and name not in answers:
            raise AnnotationError(
                f"{where} has no annotation in {paths[1]}: get both files of one release"
            )
        known: dict[str, Any] = {"answers": ()} if answers is None else answers[name]
        yield Record(
            id=name,
            images=(pictures.find(image(row, where), usual=".jpg", where=where),),
            prompt=text_of(row, "question", where),
            task=task,
            split=split,
            **known,
        )
    stray = sorted((answers or {}).keys() - asked)
    if stray:
        raise AnnotationError(
            f"{paths[1]}: {len(stray)} annotations have no question in {paths[0]}, such as "
            f"{stray[0]}: get both files of one release"
        )


def read_vqav2(raw: pathlib.Path, split: str, task: str = "vqav2") -> Iterator[Record]:
    """Yields VQAv2 from its official files or LAVIS's; test and test-dev have no answers.

    Images below `raw`: `train2014/COCO_train2014_000000000009.jpg` and so on.
    """
    layout, paths = pick_layout(raw, split, VQAV2, VQAV2_LAVIS)
    if layout == 1:
        return unique(_lavis(raw, split, task, paths[0]))
    folder = {"train": "train2014", "val": "val2014"}.get(split, "test2015")
    return unique(vqa_tool(raw, split, task, paths, functools.partial(_coco_image, folder)))


def read_okvqa(raw: pathlib.Path, split: str, task: str = "okvqa") -> Iterator[Record]:
    """Yields OK-VQA from its official files or, for train only, LAVIS's.

    Images below `raw`: `train2014/COCO_train2014_000000000009.jpg` and so on.
    """
    layout, paths = pick_layout(raw, split, OKVQA, OKVQA_LAVIS)
    if layout == 1:
        return unique(_lavis(raw, split, task, paths[0]))
    image = functools.partial(_coco_image, f"{split}2014")
    return unique(vqa_tool(raw, split, task, paths, image))


def read_vizwiz(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields VizWiz-VQA from its official file (LAVIS's is equal) or from files in VQAv2's layout.

    Images below `raw`: `val/VizWiz_val_00000000.jpg` and so on. Each image has one question, so
    that the id of a record is the image's name; in VQAv2's layout it is the number there.
    """
    layout, paths = pick_layout(raw, split, VIZWIZ, VIZWIZ_TOOL)
    if layout == 1:
        image = functools.partial(_file_in, split)
        return unique(vqa_tool(raw, split, "vizwiz", paths, image))
    return unique(_vizwiz(raw, split, paths[0]))


def _tool_answers(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    answers: dict[str, dict[str, Any]] = {}
    for row in _rows(path, "annotations"):
        name = _number(row, "question_id", str(path))
        where = f"{path}: question {name}"
        if name in answers:
            raise AnnotationError(f"{where} is annotated twice: delete one of its annotations")
        answers[name] = _annotators(row, where)
    return answers


def _annotators(row: dict[str, Any], where: str, *, hidden: bool = False) -> dict[str, Any]:
    """Returns `answers` and `blank` of a record, from `row["answers"]`, `[{"answer"}, ...]`."""
    if hidden:
        return annotated(row, "answers", where, hidden=True)
    texts = [
        field(require(each, dict, f"{where}: answers"), "answer", str, f"{where}: answers")
        for each in field(row, "answers", list, where)
    ]
    return annotated({"answers": texts}, "answers", where)


def _lavis(raw: pathlib.Path, split: str, task: str, path: pathlib.Path) -> Iterator[Record]:
    """Yields the records of LAVIS's file, a JSON list of questions.

    A question has `question_id`, `question`, `answer` (a list of texts) and `image` (a path).
    """
    for number, row in enumerate(read_json(path, list)):
        where = f"{path}: row {number}"
        yield Record(
            id=_number(require(row, dict, where), "question_id", where),
            images=(inside(raw, text_of(row, "image", where), where=where),),
            prompt=text_of(row, "question", where),
            task=task,
            split=split,
            **annotated(row, "answer", where),
        )


def _vizwiz(raw: pathlib.Path, split: str, path: pathlib.Path) -> Iterator[Record]:
    """Yields the records of VizWiz's file, a JSON list of `{"image", "question", "answers"}`.

    `answers` is a list of `{"answer": text}`; test has none.
    """
    for number, row in enumerate(read_json(path, list)):
        where = f"{path}: row {number}"
        name = text_of(require(row, dict, where), "image", where)
        yield Record(
            id=pathlib.PurePosixPath(name).stem,
            images=(inside(raw, split, name, where=where),),
            prompt=text_of(row, "question", where),
            task="vizwiz",
            split=split,
            **_annotators(row, where, hidden=split == "test"),
        )


def _rows(path: pathlib.Path, name: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(field(read_json(path, dict), name, list, str(path))):
        yield require(row, dict, f"{path}: {name}[{number}]")


def _number(row: dict[str, Any], name: str, where: str) -> str:
    return str(field(row, name, (int, str), where))


def _coco_image(folder: str, row: dict[str, Any], where: str) -> str:
    return f"{folder}/COCO_{folder}_{field(row, 'image_id', int, where):012d}"


def _file_in(folder: str, row: dict[str, Any], where: str) -> str:
    return f"{folder}/{text_of(row, 'image_id', where)}"


_VQA_LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/datasets"
_COCO_IMAGES = "https://cocodataset.org/#download"

_VQAV2 = Dataset(
    name="vqav2",
    family="image QA",
    held_in=True,
    read=read_vqav2,
    files=VQAV2,
    rerelease=VQAV2_LAVIS,
    counts={"train": 443_757, "val": 214_354},
    templates="question",
    licence="annotations CC BY 4.0; images: terms of Flickr",
    source=f"https://visualqa.org/download.html; LAVIS: {_VQA_LAVIS}/vqav2/vqa_train.json, "
    f"vqa_val.json; images: {_COCO_IMAGES}",
    notes="Images in train2014/, val2014/ and test2015/. Test answers are not public. "
    "InstructBLIP's mixture holds train alone, to go by its published ratios.",
)
_OKVQA = Dataset(
    name="okvqa",
    family="knowledge-grounded image QA",
    held_in=True,
    read=read_okvqa,
    files=OKVQA,
    rerelease=OKVQA_LAVIS,
    counts={"train": 9_009, "val": 5_046},
    templates="question",
    licence="annotations CC BY 4.0; images: terms of Flickr",
    source=f"https://okvqa.allenai.org/download.html; LAVIS: {_VQA_LAVIS}/okvqa/okvqa_train.json; "
    f"images: {_COCO_IMAGES}",
    notes="Images in train2014/ and val2014/. val is what papers call test. Releases 1.0 and 1.1 "
    "have other stems of the same answers: do not mix their files.",
)


def as_questions(answering: Dataset, read: Callable[..., Iterator[Record]]) -> Dataset:
    """Returns a dataset for question generation: from an image and an answer, write the question.

    It has the training records of the dataset `answering`, read by `read`, a function of (raw,
    split, task); its templates exchange question and answer.
    """
    name = f"{answering.name}_questions"
    return dataclasses.replace(
        answering,
        name=name,
        family="image question generation",
        held_in=True,
        read=functools.partial(read, task=name),
        files={"train": answering.files["train"]},
        rerelease={k: v for k, v in answering.rerelease.items() if k == "train"},
        counts={k: v for k, v in answering.counts.items() if k == "train"},
        templates="question_generation",
        notes=f"The files of {answering.name}, train alone: the paper does not score it.",
    )


DATASETS = (
    _VQAV2,
    Dataset(
        name="vizwiz",
        family="image QA",
        held_in=False,
        read=read_vizwiz,
        files=VIZWIZ,
        rerelease=VIZWIZ_TOOL,
        counts={"val": 4_319},
        templates="question",
        licence="CC BY 4.0",
        source="https://vizwiz.org/tasks-and-datasets/vqa",
        notes="Images in train/, val/ and test/. Test answers are not public: the paper's figure "
        "is test-dev of the EvalAI server. The other release is that of Open Flamingo.",
    ),
    _OKVQA,
    as_questions(_VQAV2, read_vqav2),
    as_questions(_OKVQA, read_okvqa),
)
