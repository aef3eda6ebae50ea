import json
import pathlib

import pytest

from jax_instructblip.data.datasets import get_dataset
from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.vqa import (
    read_okvqa,
    read_vizwiz,
    read_vqav2,
)
from jax_instructblip.data.records import Record


def write(folder: pathlib.Path, files) -> pathlib.Path:
    """`folder` with files of JSON, or of JSON lines."""
    for name, document in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text("".join(f"{json.dumps(row)}\n" for row in document))
        else:
            path.write_text(json.dumps(document))
    return folder


def linked(folder: pathlib.Path, files) -> pathlib.Path:
    for name, target in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    return folder


# The layouts, by hand


def annotators(*answers):
    return [
        {"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers)
    ]


QUESTIONS = {
    "questions": [
        {"question_id": 421, "image_id": 42, "question": " Is it red? "},
        {"question_id": 90, "image_id": 9, "question": "How many?"},
    ]
}
ANNOTATIONS = {
    "annotations": [
        {"question_id": 90, "image_id": 9, "answers": annotators("2", "2", "", "two")},
        {"question_id": 421, "image_id": 42, "answers": annotators("yes", "no", "yes")},
    ]
}
LAVIS = [
    {
        "question_id": 421,
        "question": "Is it red?",
        "answer": ["yes", "no", "yes"],
        "image": "val2014/COCO_val2014_000000000042.jpg",
        "dataset": "vqa",
    },
    {
        "question_id": 90,
        "question": "How many?",
        "answer": ["2", "2", "", "two"],
        "image": "val2014/COCO_val2014_000000000009.jpg",
        "dataset": "vqa",
    },
]
V2_VAL = ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")
OK_TRAIN = ("OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json")


def expected(raw, task, split, folder):
    return [
        Record(
            id=name,
            images=(str(raw / folder / f"COCO_{folder}_{image:012d}.jpg"),),
            prompt=question,
            answers=answers,
            task=task,
            split=split,
            blank=blank,
        )
        for name, image, question, answers, blank in (
            ("421", 42, "Is it red?", ("yes", "no", "yes"), 0),
            ("90", 9, "How many?", ("2", "2", "two"), 1),
        )
    ]


def test_vqav2_as_released_and_by_lavis(tmp_path):
    records = expected(tmp_path, "vqav2", "val", "val2014")
    write(tmp_path, {"vqa_val.json": LAVIS})
    assert list(read_vqav2(tmp_path, "val")) == records
    write(tmp_path, {V2_VAL[0]: QUESTIONS, V2_VAL[1]: ANNOTATIONS, "vqa_val.json": []})
    assert list(read_vqav2(tmp_path, "val")) == records


@pytest.mark.parametrize(("split", "part"), [("testdev", "test-dev"), ("test", "test")])
def test_hidden_answers_of_vqav2(tmp_path, split, part):
    name = f"v2_OpenEnded_mscoco_{part}2015_questions.json"
    first, _ = read_vqav2(write(tmp_path, {name: QUESTIONS}), split)
    assert first.answers == ()
    assert first.images == (str(tmp_path / "test2015/COCO_test2015_000000000042.jpg"),)


def test_okvqa_as_released_and_by_lavis(tmp_path):
    write(tmp_path, {OK_TRAIN[0]: QUESTIONS, OK_TRAIN[1]: ANNOTATIONS})
    records = list(read_okvqa(tmp_path, "train"))
    assert records == expected(tmp_path, "okvqa", "train", "train2014")
    (tmp_path / OK_TRAIN[0]).unlink()
    rows = [row | {"image": row["image"].replace("val", "train")} for row in LAVIS]
    assert list(read_okvqa(write(tmp_path, {"okvqa_train.json": rows}), "train")) == records


@pytest.mark.parametrize(
    "name, files",
    [
        ("vqav2_questions", {"vqa_train.json": LAVIS}),
        ("okvqa_questions", {"okvqa_train.json": LAVIS}),
    ],
)
def test_questions_to_be_generated_are_those_of_the_answering_set(tmp_path, name, files):
    first, second = get_dataset(name).read(write(tmp_path, files), "train")
    assert (first.task, first.prompt, first.answers) == (name, "Is it red?", ("yes", "no", "yes"))
    assert second.id == "90"


VIZWIZ = {"image": "VizWiz_val_00000003.jpg", "question": "What is it?", "answerable": 1}


def test_vizwiz_as_released(tmp_path):
    rows = [VIZWIZ | {"answers": annotators("tea", "tea", "can")}]
    files = {"Annotations/val.json": rows, "Annotations/test.json": [VIZWIZ]}
    assert list(read_vizwiz(write(tmp_path, files), "val")) == [
        Record(
            id="VizWiz_val_00000003",
            images=(str(tmp_path / "val/VizWiz_val_00000003.jpg"),),
            prompt="What is it?",
            answers=("tea", "tea", "can"),
            task="vizwiz",
            split="val",
        )
    ]
    assert [r.answers for r in read_vizwiz(tmp_path, "test")] == [()]


# Real files, whole


def test_questions_of_okvqa(tmp_path, shared):
    folder = shared / "data/vqa/okvqa"
    soft = json.loads((folder / "okvqa_val_softlabels_lxmert.json").read_text())
    annotations = [
        {"question_id": row["question_id"], "answers": annotators(*row["label"])} for row in soft
    ]
    questions = "OpenEnded_mscoco_val2014_questions.json"
    linked(tmp_path, {questions: folder / questions})
    write(tmp_path, {"mscoco_val2014_annotations.json": {"annotations": annotations}})
    records = list(read_okvqa(tmp_path, "val"))
    assert len(records) == 5046
    assert [(r.id, r.prompt, r.answers) for r in (records[0], records[2500], records[5045])] == [
        ("2971475", "What sport can you use this for?", ("racing", "motocross", "riding")),
        (
            "3183865",
            "What is the name of the long green legumes shown here?",
            ("snap peas", "faba", "green beans", "peas"),
        ),
        (
            "5818295",
            "What fruit is typically added to the top of cereal?",
            ("banana", "strawberries", "blueberries"),
        ),
    ]
    assert records[0].images == (str(tmp_path / "val2014/COCO_val2014_000000297147.jpg"),)


def test_vizwiz_val_of_the_vqa_tools(tmp_path, shared):
    names = ("val_questions_vqa_format.json", "val_annotations_vqa_format.json")
    linked(tmp_path, {name: shared / "data/vqa/vizwiz" / name for name in names})
    records = list(read_vizwiz(tmp_path, "val"))
    assert len(records) == 4319
    assert {len(r.answers) for r in records} == {10}
    assert records[0].prompt == "Ok. There is another picture I hope it is a better one."
    assert records[0].images == (str(tmp_path / "val/VizWiz_val_00000000.jpg"),)
    assert records[100].prompt == "Can you see the dosage information? Thank you."
    assert records[100].answers == (
        *("heavy power", "no", "no", "no", "no", "unanswerable", "unanswerable", "no", "no"),
        "unanswerable",
    )
    assert (records[4318].id, records[4318].answers[9]) == ("4318", "indian spice")


# Files that cannot be used


def changed(document, name, place, **fields):
    """The document with fields of one row changed; None takes a field away."""
    rows = list(document[name])
    row = rows[place] | fields
    rows[place] = {key: value for key, value in row.items() if value is not None}
    return {name: rows}


@pytest.mark.parametrize(
    "questions, annotations, message",
    [
        (
            QUESTIONS,
            None,
            "lacks files of split 'val': v2_mscoco_val2014_annotations.json, or else",
        ),
        ({"data": []}, ANNOTATIONS, "no field 'questions'; found data: is it another release"),
        (QUESTIONS, [], "found a list at the top, expected an object"),
        (
            changed(QUESTIONS, "questions", 1, question_id=421),
            ANNOTATIONS,
            "id '421' of vqav2 val is used twice: by records 0 and 1",
        ),
        (
            changed(QUESTIONS, "questions", 1, question_id=91),
            ANNOTATIONS,
            "question 91 has no annotation in .*annotations.json: get both files of one release",
        ),
        (
            {"questions": QUESTIONS["questions"][:1]},
            ANNOTATIONS,
            "1 annotations have no question in .*, such as 90",
        ),
        (
            changed(QUESTIONS, "questions", 0, question="  "),
            ANNOTATIONS,
            "question 421: question is blank",
        ),
        (
            changed(QUESTIONS, "questions", 0, image_id="COCO_42.jpg"),
            ANNOTATIONS,
            "question 421: image_id: found text, expected a whole number",
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 1, answers=[]),
            "question 421: answers holds nothing",
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 1, answers=annotators("", " ")),
            "question 421: answers holds only blank texts",
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 1, answers=["yes"]),
            "question 421: answers: found text, expected an object",
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 1, answers=None, multiple_choice_answer="yes"),
            "question 421: no field 'answers'; found question_id, image_id, multiple_choice_answer",
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 1, question_id=90),
            "question 90 is annotated twice",
        ),
    ],
)
def test_files_of_the_vqa_tools_that_cannot_be_used(tmp_path, questions, annotations, message):
    files = {V2_VAL[0]: questions} | ({} if annotations is None else {V2_VAL[1]: annotations})
    with pytest.raises(AnnotationError, match=message):
        list(read_vqav2(write(tmp_path, files), "val"))


@pytest.mark.parametrize(
    "read, split, files, message",
    [
        (read_okvqa, "test", {}, "split 'test' is not known, expected one of train, val"),
        (
            read_okvqa,
            "train",
            {"okvqa_train.json": [LAVIS[0] | {"answer": []}]},
            "row 0: answer holds nothing",
        ),
        (
            read_okvqa,
            "train",
            {"okvqa_train.json": [LAVIS[0] | {"image": "../../secret.jpg"}]},
            r"row 0: the path '../../secret.jpg' leads out of the folder",
        ),
        (read_vizwiz, "val", {"Annotations/val.json": [VIZWIZ]}, "row 0: no field 'answers'"),
        (
            read_vizwiz,
            "test",
            {"Annotations/test.json": [VIZWIZ, VIZWIZ]},
            "id 'VizWiz_val_00000003' of vizwiz test is used twice",
        ),
        (
            read_vizwiz,
            "test",
            {"Annotations/test.json": [VIZWIZ | {"image": "/VizWiz.jpg"}]},
            "row 0: the path '/VizWiz.jpg' leads out",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path, read, split, files, message):
    with pytest.raises(AnnotationError, match=message):
        list(read(write(tmp_path, files), split))


def test_windows_line_ends(tmp_path):
    path = tmp_path / V2_VAL[0]
    path.write_bytes(json.dumps(QUESTIONS, indent=1).replace("\n", "\r\n").encode("utf-8-sig"))
    write(tmp_path, {V2_VAL[1]: ANNOTATIONS})
    assert list(read_vqav2(tmp_path, "val")) == expected(tmp_path, "vqav2", "val", "val2014")


def test_questions_that_are_not_utf8(tmp_path):
    write(tmp_path, {V2_VAL[1]: ANNOTATIONS})
    (tmp_path / V2_VAL[0]).write_bytes('{"questions": "Où?"}'.encode("latin-1"))
    with pytest.raises(AnnotationError, match=f"{V2_VAL[0]} is not UTF-8"):
        list(read_vqav2(tmp_path, "val"))
