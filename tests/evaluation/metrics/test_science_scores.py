import gzip
import json

import pytest

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics.metric import Response
from jax_instructblip.evaluation.metrics.science_scores import (
    LETTERS,
    named_letter,
    score_science_qa,
)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("LECTURE: A map.\nSOLUTION: Rome.\n The answer is B.", "B"),
        ("The answer is B", ""),  # cut off
        ("The answer is A. The answer is B.", ""),
        ("The answer is b.", ""),
        (" C\n", "C"),
        ("D. Rome", "D"),
        ("D.", ""),
        ("Rome", ""),
        ("", ""),
    ],
)
def test_the_letter_that_an_answer_names(text, letter):
    assert named_letter(text) == letter


def test_published_outputs_have_their_published_index(shared):
    path = shared / "data/llava/review/test_sqa_llava_13b_v0.json.gz"
    published = json.loads(gzip.decompress(path.read_bytes()))
    outputs, results = published["outputs"], published["results"]
    wrong = [key for key in outputs if LETTERS.find(named_letter(outputs[key])) != results[key]]
    assert len(outputs) == 4241 and wrong == ["3247"]
    # Its problem has two choices; where the original drew one, D is right for none.
    record = Record("3247", (), "?", ("b",), choices=("a", "b"), correct=1)
    assert score_science_qa([Response("3247", outputs["3247"])], [record]).values["accuracy"] == 0


def record(name, task, correct=0, **fields):
    given = {"images": ("a.png",), "choices": ("x", "y"), **fields}
    return Record(name, prompt="?", answers=("x",), task=task, correct=correct, **given)


def test_accuracy_by_subject_context_and_grade():
    records = [
        record("1", "scienceqa_qcm/NAT/G1-6", context="a hint"),
        record("2", "scienceqa_qcm/NAT/G7-12", images=()),
        record("3", "scienceqa_qcm/LAN/G1-6", correct=1),
        record("4", "scienceqa_qcm/LAN/G1-6", images=(), context="a hint"),
    ]
    texts = ["The answer is A.", "The answer is B.", "B. y", "The answer is C."]
    scores = score_science_qa(
        [Response(each.id, text) for each, text in zip(records, texts, strict=True)], records
    )
    assert scores.samples["accuracy"] == (1, 0, 1, 0)
    assert scores.values == {
        "accuracy": 0.5,
        "accuracy/NAT": 0.5,
        "accuracy/LAN": 0.5,
        "accuracy/TXT": 0.5,
        "accuracy/IMG": 1.0,
        "accuracy/NO": 0.0,
        "accuracy/G1-6": pytest.approx(2 / 3),
        "accuracy/G7-12": 0.0,
    }
    assert scores.standard_errors().keys() == {
        *("accuracy", "accuracy/NAT", "accuracy/LAN", "accuracy/TXT", "accuracy/IMG"),
        "accuracy/G1-6",
    }
    ranked = [Response(each.id, "", (0.0, 1.0)) for each in records]
    assert score_science_qa(ranked, records).samples["accuracy"] == (0, 0, 1, 0)
