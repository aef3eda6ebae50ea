import json

import pytest

from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.memes import DATASETS, read_hateful_memes
from jax_instructblip.data.records import Record
from jax_instructblip.data.templates import format_prompt
from jax_instructblip.evaluation.protocol import BENCHMARKS

ROW = {"id": 8291, "img": "img/08291.png", "label": 1, "text": "white people is this"}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def test_labels_become_choices(tmp_path):
    write(tmp_path / "dev_seen.jsonl", ROW, "", ROW | {"id": 1, "label": 0})
    hateful, harmless = read_hateful_memes(tmp_path, "val")
    assert hateful == Record(
        id="8291",
        images=(str(tmp_path / "img" / "08291.png"),),
        prompt="Is it hateful?",
        answers=("yes",),
        task="hateful_memes",
        choices=("yes", "no"),
        split="val",
        correct=0,
        context="white people is this",
    )
    assert (harmless.correct, harmless.answers) == (1, ("no",))


FILES = [
    ("train", "train.jsonl"),
    ("val", "dev.jsonl"),
    ("test", "test_seen.jsonl"),
    ("test", "test.jsonl"),
    ("val_unseen", "dev_unseen.jsonl"),
    ("test_unseen", "test_unseen.jsonl"),
]


@pytest.mark.parametrize(("split", "file"), FILES)
def test_files_of_both_releases(tmp_path, split, file):
    write(tmp_path / file, {name: value for name, value in ROW.items() if name != "label"})
    (record,) = read_hateful_memes(tmp_path, split)
    assert (record.split, record.correct, record.answers) == (split, -1, ())


def test_the_prompt_of_the_table(tmp_path):
    write(tmp_path / "train.jsonl", ROW)
    (record,) = read_hateful_memes(tmp_path, "train")
    assert format_prompt(BENCHMARKS["hateful_memes"].prompt, record) == (
        'This is an image with: "white people is this" written on it. Is it hateful? Answer:'
    )


BAD = [
    ([ROW | {"label": 2}], "train.jsonl:1: label is 2, expected 0 or 1"),
    ([ROW | {"label": True}], "label: found true or false, expected a whole number"),
    ([ROW | {"label": None}], "label: found null, expected a whole number"),
    ([ROW, "", ROW], "id '8291' of hateful_memes train is used twice: by records 0 and 1"),
    ([ROW | {"img": "img/../../x.png"}], "the path 'img/../../x.png' leads out of the folder"),
    ([ROW | {"img": "/x.png"}], "train.jsonl:1: the path '/x.png' leads out of the folder"),
    ([ROW | {"text": ""}], "train.jsonl:1: text is blank"),
    ([ROW, '{"id": 3'], "train.jsonl:2: not valid JSON"),
    ([{"id": 3, "label": 0}], "no field 'img'; found id, label"),
]


@pytest.mark.parametrize(("rows", "message"), BAD)
def test_bad_lines(tmp_path, rows, message):
    write(tmp_path / "train.jsonl", *rows)
    with pytest.raises(AnnotationError) as error:
        list(read_hateful_memes(tmp_path, "train"))
    assert message in str(error.value)


def test_the_row_of_the_table():
    (row,) = DATASETS
    assert (row.held_in, row.counts["val"]) == (False, 500)
