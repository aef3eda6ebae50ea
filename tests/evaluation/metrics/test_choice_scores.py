import json

import numpy as np
import pytest

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics.choice_scores import (
    auroc,
    class_scores,
    score_accuracy,
    score_auroc,
    score_yes_no,
)
from jax_instructblip.evaluation.metrics.metric import MetricError, Response


def record(name, choices, correct):
    answers = (choices[correct],) if correct >= 0 else ()
    return Record(name, ("a.jpg",), "What?", answers, choices=choices, correct=correct)


COLOURS = ("red", "blue", "green")


@pytest.mark.parametrize(
    ("response", "choices", "correct", "expected"),
    [
        (Response("1", "", (-3.0, -1.0, -2.0)), COLOURS, 1, 1),
        (Response("1", "red", (-3.0, -1.0, -2.0)), COLOURS, 1, 1),  # scores win
        (Response("1", "", (-1.0, -1.0, -2.0)), COLOURS, 1, 0),  # the first of equals
        (Response("1", "", (-1.0, -1.0, -2.0)), COLOURS, 0, 1),
        (Response("1", " Blue\n"), COLOURS, 1, 1),
        (Response("1", "blueish"), COLOURS, 1, 0),
        (Response("1", ""), COLOURS, 1, 0),
        (Response("1", "yes"), ("false", "true"), 1, 1),
        (Response("1", "No"), ("false", "true"), 1, 0),
        (Response("1", "true"), ("yes", "no"), 0, 1),
    ],
)
def test_accuracy(response, choices, correct, expected):
    scores = score_accuracy([response], [record("1", choices, correct)])
    assert scores.values == {"accuracy": expected}
    assert scores.samples == {"accuracy": (expected,)}


def test_records_must_say_what_is_right():
    with pytest.raises(MetricError, match="1 records have no choices, .* such as '2'"):
        score_accuracy(
            [Response("1", "red"), Response("2", "red")],
            [record("1", COLOURS, 0), record("2", COLOURS, -1)],
        )
    with pytest.raises(MetricError, match="'1' has 2 scores, but 3 choices"):
        score_accuracy([Response("1", "", (0.0, 1.0))], [record("1", COLOURS, 0)])


@pytest.mark.parametrize("levels", [1000, 4, 1])  # of which few make many ties
def test_auroc_is_the_share_of_pairs_in_order(levels):
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(levels, size=60).astype(float), rng.random(60) < 0.3
    pairs = [
        (positive > negative) + (positive == negative) / 2
        for positive in scores[labels]
        for negative in scores[~labels]
    ]
    assert auroc(scores, labels) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_auroc_of_memes():
    records = [record(str(i), ("yes", "no"), i % 2) for i in range(4)]
    margins = (2.0, 1.0, 0.5, -1.0)  # of yes over no; 0 and 2 are hateful
    responses = [Response(str(i), "", (margin - 5, -5.0)) for i, margin in enumerate(margins)]
    scores = score_auroc(responses, records)
    assert scores.values == {"auroc": 0.75, "accuracy": 0.75}
    assert scores.samples == {"accuracy": (1.0, 0.0, 1.0, 1.0), "margin": margins}
    # The order of the choices and a common shift of their scores change nothing.
    turned = [record(str(i), ("no", "yes"), 1 - i % 2) for i in range(4)]
    swapped = [Response(str(i), "", (0.0, margin)) for i, margin in enumerate(margins)]
    assert score_auroc(swapped, turned).values == scores.values
    # What could not be answered is as wrong as can be.
    silent = [*responses[:3], Response("3")]
    assert score_auroc(silent, records).values == {"auroc": 0.25, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("responses", "records", "message"),
    [
        ([Response("1", "yes")], [record("1", ("yes", "no"), 0)], "'1' was generated"),
        ([Response("1", "", (1, 2, 3))], [record("1", COLOURS, 0)], "expects two"),
        ([Response("1", "", (1, 2))], [record("1", ("red", "blue"), 0)], "expects two"),
        ([Response("1", "", (1, 2))], [record("1", ("yes", "no"), 0)], "1 positive and 0 negative"),
    ],
)
def test_auroc_is_refused(responses, records, message):
    with pytest.raises(MetricError, match=message):
        score_auroc(responses, records)


def test_words_of_a_choice_add_up():
    words = (("yes", "true"), ("no",))
    found = class_scores(np.log([0.1, 0.3, 0.5]), words)
    assert found == pytest.approx(np.log([0.4, 0.5]), abs=1e-12)
    with pytest.raises(MetricError, match="2 scores of 3 words"):
        class_scores([0.0, 0.0], words)


def test_yes_and_no_are_read_from_the_first_sentence():
    texts = {
        **{"Yes": True, "No": False, "no, there is not.": False, "There is. No": True},
        **{"It is not there": False, "Nothing": True, "": True},
    }
    records = [Record(text or "-", ("a.jpg",), "", ("yes",)) for text in texts]
    responses = [Response(text or "-", text) for text in texts]
    assert score_yes_no(responses, records).samples["accuracy"] == tuple(map(float, texts.values()))
    with pytest.raises(MetricError, match="'-' is answered 'red'"):
        score_yes_no([Response("-")], [Record("-", ("a.jpg",), "", ("red",))])


def test_nothing_said_yes():
    records = [Record("1", ("a.jpg",), "", ("no",))]
    values = score_yes_no([Response("1", "no")], records).values
    assert (values["f1"], values["precision"], values["recall"], values["accuracy"]) == (0, 0, 0, 1)


@pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
def test_pope_has_its_recorded_scores(shared, kind):
    asked = _lines(shared / "data/llava/eval/pope/llava_pope_test.jsonl")
    given = _lines(shared / "data/llava/eval/pope/answers/llava-v1.5-13b.jsonl")
    said = {
        (question["category"], question["image"], question["text"].split("\n")[0]): answer["text"]
        for question, answer in zip(asked, given, strict=True)
    }
    rows = _lines(shared / f"data/vqa/pope/coco_pope_{kind}.json")
    names = [str(number) for number in range(len(rows))]
    responses = [
        Response(name, said[kind, row["image"], row["text"]])
        for name, row in zip(names, rows, strict=True)
    ]
    records = [
        Record(name, (row["image"],), row["text"], (row["label"],))
        for name, row in zip(names, rows, strict=True)
    ]
    found = score_yes_no(responses, records).values
    golden = json.loads((shared / "data/vqa/golden_scores.json").read_text())[f"pope_{kind}"]
    assert golden["n"] == len(rows)
    assert {
        **{"F1": found["f1"], "accuracy": found["accuracy"], "yes_ratio": found["yes_ratio"]},
        **{"TP": found["true_positives"], "FP": found["false_positives"]},
        **{"TN": found["true_negatives"], "FN": found["false_negatives"]},
    } == {name: golden[name] for name in ("F1", "accuracy", "yes_ratio", "TP", "FP", "TN", "FN")}


def _lines(path):
    """JSON lines, of which the first and the last may have the brackets of a list."""
    return [json.loads(line.strip("[],")) for line in path.read_text().splitlines()]
