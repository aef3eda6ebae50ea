import json

import pytest

from jax_instructblip.data.datasets import EVALUATION, get_dataset
from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.scienceqa import (
    answer_text,
    question_text,
    read_conversations,
    read_scienceqa_qcm,
)
from jax_instructblip.data.records import Record

PROBLEM = {
    "question": "Which is farthest north?",
    "choices": ["Oslo", "Rome"],
    "answer": 1,
    "hint": " See the map. ",
    "image": "image.png",
    "split": "test",
    "subject": "social science",
    "grade": "grade7",
    "lecture": "A map  shows places.",
    "solution": "Rome is above.",
}


def write(folder, **problems):
    (folder / "problems.json").write_text(json.dumps(problems))
    return folder


def test_all_problems_of_a_split_are_read_without_an_image_too(tmp_path):
    bare = PROBLEM | {"image": None, "hint": "", "subject": "language science", "grade": "grade6"}
    raw = write(tmp_path, **{"4": PROBLEM, "5": bare, "6": PROBLEM | {"split": "train"}})
    first, second = read_scienceqa_qcm(raw, "test")
    assert first == Record(
        id="4",
        images=(str(raw / "images/test/4/image.png"),),
        prompt="Which is farthest north?\nContext: See the map.\nOptions: (A) Oslo (B) Rome",
        answers=("Rome",),
        task="scienceqa_qcm/SOC/G7-12",
        split="test",
        choices=("Oslo", "Rome"),
        correct=1,
        context="See the map.",
    )
    assert (second.images, second.context, second.task) == ((), "", "scienceqa_qcm/LAN/G1-6")
    assert "\nContext: N/A\n" in second.prompt


def test_conversations_are_llavas_rows(tmp_path):
    bare = PROBLEM | {"image": None, "lecture": "", "solution": " "}
    (tmp_path / "raw").mkdir()
    raw = write(tmp_path / "raw", **{"4": PROBLEM, "5": bare})
    question = "Which is farthest north?\nContext: See the map.\nOptions: (A) Oslo (B) Rome"
    answer = "A map shows places. Rome is above. The answer is B."
    assert list(read_conversations(raw, "test", tmp_path / "out")) == [
        {
            "id": "4",
            "image": "../raw/images/test/4/image.png",
            "conversations": [
                {"from": "human", "value": f"{question}\n<image>"},
                {"from": "gpt", "value": answer},
            ],
        },
        {
            "id": "5",
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": "The answer is B."},
            ],
        },
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["Oslo", " "]}, r"problem 4: choices\[1\] is blank"),
        ({"choices": []}, "problem 4: 0 choices, expected 1 to 26"),
        ({"answer": 2}, "problem 4: answer is 2, expected the index of one of 2 choices"),
        ({"subject": "art"}, "problem 4: subject is 'art', expected one of natural science, "),
        ({"grade": "grade13"}, "problem 4: grade is 'grade13', expected grade1 to grade12"),
        ({"image": "../../../../a.png"}, "leads out of the folder"),
        ({"lecture": None}, "problem 4: lecture: found null, expected text"),
    ],
)
def test_a_bad_problem_is_named(tmp_path, change, message):
    with pytest.raises(AnnotationError, match=message):
        list(read_scienceqa_qcm(write(tmp_path, **{"4": PROBLEM | change}), "test"))


def test_real_problems(shared, tmp_path):
    problems = json.loads((shared / "data/vqa/scienceqa/problems.extract.json").read_text())
    raw = write(tmp_path, **problems)
    dataset = get_dataset("scienceqa_qcm")
    assert dataset is EVALUATION["scienceqa_qcm"]
    sizes = {split: len(list(dataset.read(raw, split))) for split in ("train", "val", "test")}
    assert sizes == {"train": 170, "val": 120, "test": 170}
    for record in read_scienceqa_qcm(raw, "test"):
        problem = problems[record.id]
        assert len(record.images) == bool(problem["image"])
        assert record.choices == tuple(problem["choices"]) and record.correct == problem["answer"]
        assert record.prompt == question_text(problem["question"], problem["hint"], record.choices)
    rows = list(read_conversations(raw, "train", raw))
    letters = [row["conversations"][1]["value"][-2] for row in rows]
    train = [problem for problem in problems.values() if problem["split"] == "train"]
    assert letters == ["ABCDE"[problem["answer"]] for problem in train]
    assert answer_text("", "", "C") == "The answer is C."
