import json
import pathlib

import pytest

from jax_instructblip.data.datasets import get_dataset
from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.reasoning import read_gqa, read_vsr
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


TESTDEV = "testdev_balanced_questions.json"


# The layouts, by hand


def test_gqa_as_released_and_by_lavis(tmp_path):
    row = {"question": "Is it red?", "answer": "no"}
    written = write(tmp_path, {TESTDEV: {"2011": row | {"imageId": "n5", "fullAnswer": "No."}}})
    records = list(read_gqa(written, "testdev"))
    assert records == [
        Record(
            id="2011",
            images=(str(tmp_path / "images/n5.jpg"),),
            prompt="Is it red?",
            answers=("no",),
            task="gqa",
            split="testdev",
        )
    ]
    write(tmp_path, {TESTDEV: [row | {"image": "n5.jpg", "question_id": "2011"}]})
    assert list(read_gqa(tmp_path, "testdev")) == records


# Real files, whole


@pytest.mark.parametrize(
    "part, count, place, expected",
    [
        (
            "head",
            1733,
            0,
            (
                "201030459",
                "n54424.jpg",
                "What is the name of the piece of furniture that is in front of the white wall?",
                ("couch",),
            ),
        ),
        (
            "head",
            1733,
            1732,
            (
                "20984562",
                "n12214.jpg",
                "Do you see cars to the right of the black van?",
                ("yes",),
            ),
        ),
        (
            "tail",
            1063,
            0,
            ("201030415", "n54424.jpg", "What kind of furniture is brown?", ("couch",)),
        ),
    ],
)
def test_gqa_ood_in_the_layout_of_gqa(tmp_path, shared, part, count, place, expected):
    source = shared / f"data/vqa/gqa/ood_testdev_{part}.json"
    linked(tmp_path, {TESTDEV: source})
    records = list(read_gqa(tmp_path, "testdev"))
    assert len(records) == count
    record = records[place]
    image = pathlib.Path(record.images[0])
    assert image.parent == tmp_path / "images"
    assert (record.id, image.name, record.prompt, record.answers) == expected


@pytest.mark.parametrize(
    "split, count", [("test", 1222), ("dev", 340), ("random_test", 2195), ("random_dev", 1097)]
)
def test_all_of_vsr(tmp_path, shared, split, count):
    kind, name = split.split("_") if "_" in split else ("zeroshot", split)
    source = shared / f"data/vqa/vsr/{kind}_{name}.jsonl"
    linked(tmp_path, {f"splits/{kind}/{name}.jsonl": source})
    records = list(read_vsr(tmp_path, split))
    assert len(records) == count == get_dataset("vsr").counts[split]
    assert {r.answers for r in records} == {("true",), ("false",)}


def test_three_statements_of_vsr(tmp_path, shared):
    source = shared / "data/vqa/vsr/zeroshot_test.jsonl"
    linked(tmp_path, {"splits/zeroshot/test.jsonl": source})
    records = list(read_vsr(tmp_path, "test"))
    assert records[0] == Record(
        id="000000017697:0",
        images=(str(tmp_path / "images/000000017697.jpg"),),
        prompt="The car is behind the suitcase.",
        answers=("true",),
        task="vsr",
        split="test",
        choices=("false", "true"),
        correct=1,
    )
    assert (records[1].prompt, records[1].answers, records[1].correct) == (
        "The cat is under the backpack.",
        ("false",),
        0,
    )
    assert records[1221].prompt == "The cat is at the left side of the vase."
    assert sum(r.correct for r in records) == 629
    assert "000000288106:7" in {r.id for r in records}


# Files that cannot be used


@pytest.mark.parametrize(
    "read, split, files, message",
    [
        (read_gqa, "testdev", {TESTDEV: "no"}, "found text, expected an object or a list"),
        (
            read_gqa,
            "testdev",
            {TESTDEV: {"7": {"question": "What?", "answer": "a"}}},
            "question 7: no field 'imageId'; found question, answer",
        ),
        (
            read_gqa,
            "testdev",
            {TESTDEV: {"7": {"imageId": "n", "question": "What?", "answer": " "}}},
            "question 7: answer is blank",
        ),
        (
            read_vsr,
            "test",
            {"splits/zeroshot/test.jsonl": [{"image": "a.jpg", "caption": "It is.", "label": 2}]},
            r"test.jsonl:1: label is 2, expected 0 \(false\) or 1 \(true\)",
        ),
        (
            read_vsr,
            "test",
            {
                "splits/zeroshot/test.jsonl": [
                    {"image": "a.jpg", "caption": "It is.", "label": True}
                ]
            },
            "test.jsonl:1: label: found true or false, expected a whole number",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path, read, split, files, message):
    with pytest.raises(AnnotationError, match=message):
        list(read(write(tmp_path, files), split))


def test_windows_line_ends_and_blank_lines(tmp_path):
    row = b'{"image": "a.jpg", "caption": "It is.", "label": 0}'
    path = tmp_path / "splits/zeroshot/test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n" + row + b"\r\n")
    assert [(r.id, r.prompt) for r in read_vsr(tmp_path, "test")] == [
        ("a:0", "It is."),
        ("a:1", "It is."),
    ]


def test_questions_that_are_not_utf8(tmp_path):
    (tmp_path / TESTDEV).write_bytes('{"7": {"question": "Où?"}}'.encode("latin-1"))
    with pytest.raises(AnnotationError, match=f"{TESTDEV} is not UTF-8"):
        list(read_gqa(tmp_path, "testdev"))
