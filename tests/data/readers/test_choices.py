import json
import pathlib

import pytest

from jax_instructblip.data.datasets import get_dataset
from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.choices import read_aokvqa, read_iconqa, read_scienceqa
from jax_instructblip.data.records import Record


def write(folder: pathlib.Path, files) -> pathlib.Path:
    for name, document in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    return folder


AOKVQA = {
    "split": "train",
    "image_id": 42,
    "question_id": "q1",
    "question": "What is it? ",
    "choices": ["a cup", "a hat", "a dog", "a bus"],
    "correct_choice_idx": 2,
    "direct_answers": ["dog", "dog", "puppy"],
    "difficult_direct_answer": False,
    "rationales": ["It barks."],
}
SCIENCE = {
    "question": "Which is farthest north?",
    "choices": ["Oslo", "Rome"],
    "answer": 0,
    "hint": " Look at the map. ",
    "image": "image.png",
    "split": "test",
    "lecture": "A map ...",
}
ICON = {
    "question": "What has been done to this letter?",
    "choices": ["slide", "flip", "turn"],
    "answer": 1,
    "ques_type": "choose_txt",
    "label": "S",
    "grade": "grade1",
}


# The layouts, by hand


@pytest.mark.parametrize(
    "row, image",
    [
        (AOKVQA, "train2017/000000000042.jpg"),
        (AOKVQA | {"image": "train2014/COCO_42.jpg"}, "train2014/COCO_42.jpg"),
    ],
    ids=["released", "lavis"],
)
@pytest.mark.parametrize("name", ["aokvqa", "aokvqa_questions"])
def test_aokvqa(tmp_path, row, image, name):
    raw = write(tmp_path, {"aokvqa_v1p0_train.json": [row]})
    assert list(get_dataset(name).read(raw, "train")) == [
        Record(
            id="q1",
            images=(str(tmp_path / image),),
            prompt="What is it?",
            answers=("dog", "dog", "puppy"),
            task=name,
            split="train",
            choices=("a cup", "a hat", "a dog", "a bus"),
            correct=2,
        )
    ]


def test_scienceqa_takes_the_problems_of_a_split_that_have_an_image(tmp_path):
    problems = {
        "3": SCIENCE,
        "5": SCIENCE | {"image": None},
        "6": SCIENCE | {"split": "val"},
        "11": SCIENCE | {"hint": "", "answer": 1},
    }
    first, second = read_scienceqa(write(tmp_path, {"problems.json": problems}), "test")
    assert first == Record(
        id="3",
        images=(str(tmp_path / "images/test/3/image.png"),),
        prompt="Which is farthest north?",
        answers=("Oslo",),
        task="scienceqa",
        split="test",
        choices=("Oslo", "Rome"),
        correct=0,
        context="Look at the map.",
    )
    assert (second.id, second.answers, second.context) == ("11", ("Rome",), "")


def test_iconqa_as_released_and_by_lavis(tmp_path):
    rows = [ICON | {"image": f"{number}/image.png"} for number in (9, 10)]
    lavis = list(read_iconqa(write(tmp_path, {"annotations/test.json": rows}), "test"))
    folder = "iconqa/test/choose_txt"
    write(tmp_path, {f"{folder}/{number}/data.json": ICON for number in (10, 9)})
    records = list(read_iconqa(tmp_path, "test"))
    assert [r.id for r in records] == ["9", "10"]
    assert records[0] == Record(
        id="9",
        images=(str(tmp_path / folder / "9/image.png"),),
        prompt="What has been done to this letter?",
        answers=("flip",),
        task="iconqa",
        split="test",
        choices=("slide", "flip", "turn"),
        correct=1,
    )
    assert [r.id for r in lavis] == ["0", "1"]
    assert lavis[1].images == (str(tmp_path / "all_images/10/image.png"),)
    assert lavis[1].answers == ("flip",)


# Real files, whole


def by_id(records):
    return {record.id: record for record in records}


def test_aokvqa_val(tmp_path, shared):
    name = "aokvqa_v1p0_val.json"
    (tmp_path / name).symlink_to(shared / "data/vqa/aokvqa" / name)
    records = list(read_aokvqa(tmp_path, "val"))
    assert len(records) == 1145 == get_dataset("aokvqa").counts["val"]
    assert records[0] == Record(
        id="22jbM6gDxdaMaunuzgrsBB",
        images=(str(tmp_path / "val2017/000000461751.jpg"),),
        prompt="What is in the motorcyclist's mouth?",
        answers=("cigarette",) * 10,
        task="aokvqa",
        split="val",
        choices=("toothpick", "food", "popsicle stick", "cigarette"),
        correct=3,
    )
    last = records[1144]
    assert (last.id, last.correct, last.answers[9]) == ("nZANMFWTuwNWznuT9RBNXr", 0, "warning")
    # One choice and one answer of the official file are blank.
    found = by_id(records)
    letter = found["iTeGLgJNuQjkRqeTmKwWLs"]
    assert (letter.choices, letter.choices[letter.correct]) == (("s", "b", "f"), "f")
    assert len(found["Rpy3Dcuk4GLi5NsNq5Xzgt"].answers) == 9
    assert sum(len(r.answers) for r in records) == 11449


def test_aokvqa_test_hides_its_answers(tmp_path, shared):
    source = shared / "data/vqa/aokvqa/aokvqa_v1p0_test.first100.json"
    (tmp_path / "aokvqa_v1p0_test.json").symlink_to(source)
    records = list(read_aokvqa(tmp_path, "test"))
    assert len(records) == 100
    assert {(r.answers, r.correct) for r in records} == {((), -1)}
    assert records[0].choices == ("dom perignon", "cesare borgia", "mick jagger", "ice-t")


@pytest.mark.parametrize("split, count", [("train", 150), ("val", 100), ("test", 150)])
def test_problems_of_scienceqa(tmp_path, shared, split, count):
    source = shared / "data/vqa/scienceqa/problems.extract.json"
    (tmp_path / "problems.json").symlink_to(source)
    records = list(read_scienceqa(tmp_path, split))
    assert len(records) == count
    if split == "test":
        found = by_id(records)
        assert found["5"].prompt == "Which of the following could Gordon's test show?"
        assert found["5"].answers == (
            "how steady a parachute with a 1 m vent was at 200 km per hour",
        )
        assert found["5"].context.startswith("People can use the engineering-design process")
        assert found["1569"].choices == ("Olympia", "Denver", "Carson City", "Louisville")
        assert (found["1569"].correct, found["1569"].context) == (1, "")
    if split == "train":
        assert records[0].id == "1"
        assert records[0].answers == ("West Virginia",)


def test_questions_of_iconqa(tmp_path, shared):
    """MathVista's rows in the layout of the original, which is not at hand."""
    source = shared / "data/vqa/iconqa/mathvista_testmini_iconqa_and_vqa.json"
    rows = {
        pid: row
        for pid, row in json.loads(source.read_text()).items()
        if row["metadata"]["source"] == "IconQA" and row["choices"]
    }
    for pid, row in rows.items():
        problem = {"question": row["question"], "choices": row["choices"], "hint": ""}
        problem["answer"] = row["choices"].index(row["answer"])
        write(tmp_path, {f"iconqa/test/choose_txt/{pid}/data.json": problem})
    records = list(read_iconqa(tmp_path, "test"))
    assert [r.id for r in records] == sorted(rows, key=int)
    assert len(records) == 13
    assert {r.id: r.answers for r in records} == {p: (row["answer"],) for p, row in rows.items()}
    found = by_id(records)
    assert found["272"].choices == ("9:30", "1:30", "4:30", "5:30", "11:30")
    assert (found["272"].prompt, found["272"].correct) == ("What time does the clock show?", 2)
    assert found["540"].answers == ("3/11",)


# Files that cannot be used


@pytest.mark.parametrize(
    "change, message",
    [
        ({"correct_choice_idx": 4}, "question q1: correct_choice_idx is 4, expected the index of"),
        ({"correct_choice_idx": -1}, "correct_choice_idx is -1, expected the index of one of 4"),
        ({"correct_choice_idx": "2"}, "correct_choice_idx: found text, expected a whole number"),
        ({"correct_choice_idx": None}, "correct_choice_idx: found null"),
        ({"choices": []}, "question q1: choices holds nothing"),
        ({"choices": ["a", "b", "", "d"]}, "question q1: choice 2, the right one, is blank"),
        ({"direct_answers": []}, "question q1: direct_answers holds nothing"),
        ({"direct_answers": "dog"}, "direct_answers: found text, expected a list"),
        ({"question_id": ""}, "question_id is blank"),
        ({"image_id": "42"}, "question q1: image_id: found text, expected a whole number"),
        ({"image": "a/../../b.jpg"}, "question q1: the path 'a/../../b.jpg' leads out"),
    ],
)
def test_rows_of_aokvqa_that_cannot_be_used(tmp_path, change, message):
    raw = write(tmp_path, {"aokvqa_v1p0_train.json": [AOKVQA | change]})
    with pytest.raises(AnnotationError, match=message):
        list(read_aokvqa(raw, "train"))


ICON_FILE = "iconqa/test/choose_txt/9/data.json"


@pytest.mark.parametrize(
    "read, split, files, message",
    [
        (read_aokvqa, "val", {}, "lacks files of split 'val': aokvqa_v1p0_val.json: .*prepare"),
        (
            read_aokvqa,
            "val",
            {"aokvqa_v1p0_val.json": [{"question_id": 7}]},
            "question_id: found a whole number, expected text",
        ),
        (
            read_aokvqa,
            "val",
            {"aokvqa_v1p0_val.json": [AOKVQA, AOKVQA]},
            "id 'q1' of aokvqa val is used twice: by records 0 and 1",
        ),
        (
            read_scienceqa,
            "test",
            {"problems.json": {"3": {"id": 3, "conversations": []}}},
            "problem 3: no field 'split'; found id, conversations",
        ),
        (
            read_scienceqa,
            "test",
            {"problems.json": {"3": SCIENCE | {"answer": 2}}},
            "problem 3: answer is 2, expected the index of one of 2 choices",
        ),
        (
            read_scienceqa,
            "test",
            {"problems.json": {"../3": SCIENCE}},
            "problem ../3: the path .* leads out",
        ),
        (read_scienceqa, "test", {"problems.json": []}, "found a list at the top"),
        (
            read_iconqa,
            "test",
            {ICON_FILE: ICON | {"answer": "flip"}},
            "data.json: answer: found text, expected a whole number",
        ),
        (
            read_iconqa,
            "test",
            {"iconqa/test/choose_txt/data.json": ICON},
            "choose_txt has no folder with a data.json",
        ),
        (read_iconqa, "test", {"annotations/test.json": [ICON]}, "row 0: no field 'image'"),
        (read_iconqa, "dev", {}, "split 'dev' is not known, expected one of test, train, val"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, read, split, files, message):
    with pytest.raises(AnnotationError, match=message):
        list(read(write(tmp_path, files), split))


def test_windows_line_ends(tmp_path):
    path = tmp_path / "problems.json"
    text = json.dumps({"3": SCIENCE}, indent=1)
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert [r.id for r in read_scienceqa(tmp_path, "test")] == ["3"]


def test_problems_that_are_not_utf8(tmp_path):
    (tmp_path / "problems.json").write_bytes('{"3": "é"}'.encode("latin-1"))
    with pytest.raises(AnnotationError, match="problems.json is not UTF-8"):
        list(read_scienceqa(tmp_path, "test"))
