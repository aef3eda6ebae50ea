import json
from collections import Counter

import pytest

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics.metric import MetricError, Response, mean
from jax_instructblip.evaluation.metrics.table import get_metric
from jax_instructblip.evaluation.metrics.vqa_scores import (
    RULES,
    leave_one_out,
    score_direct_answer,
    score_ivqa,
    score_vqa,
)
from jax_instructblip.evaluation.protocol import BENCHMARKS


def record(answers, name="1", blank=0):
    return Record(name, ("a.jpg",), "What is it?", tuple(answers), blank=blank)


def vqa(text, answers, blank=0):
    return score_vqa([Response("1", text)], [record(answers, blank=blank)]).values


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)]
)
def test_leave_one_out(agreeing, expected):
    annotators = ["red"] * agreeing + ["blue"] * (10 - agreeing)
    assert leave_one_out("red", annotators) == pytest.approx(expected, abs=1e-12)


def test_the_three_rules_of_vqa_accuracy_differ():
    names = ("vqa_accuracy", "vqa_accuracy_lavis", "vqa_accuracy_evalai")

    def scores(text, answers):
        return tuple(round(vqa(text, answers)[name], 12) for name in names)

    assert scores("Yes", ["yes"] * 9 + ["no"]) == (1, 1, 1)
    # All annotators agree: the official tool then compares raw texts.
    assert scores("Yes.", ["yes"] * 10) == (0, 1, 1)
    assert scores("two", ["two"] * 10) == (1, 0, 1)
    # LAVIS leaves numbers and articles of the annotators as they are.
    assert scores("two dogs", ["two dogs"] * 9 + ["dogs"]) == (1, 0, 1)
    assert scores("the dog.", ["dog"] * 9 + ["cat"]) == (1, 1, 1)
    # The server's takes the comma away first, the others put a space there.
    assert scores("b,c", ["b c"] * 9 + ["d"]) == (1, 1, 0)
    assert scores("b's", ["b 's"] * 9 + ["d"]) == (0, 0, 1)


def test_answers_left_blank_agree_with_nothing():
    assert vqa("red", ["red"] * 2 + ["blue"] * 7, blank=1)["vqa_accuracy"] == pytest.approx(0.6)
    assert vqa("", ["red"] * 2 + ["blue"] * 7, blank=1)["vqa_accuracy"] == 0
    assert vqa("red", ["red"], blank=9)["vqa_accuracy"] == pytest.approx(0.3)


def test_those_who_were_never_asked_do_not_count(shared):
    cases = json.loads((shared / "data" / "cases" / "vqa_few_annotators.json").read_text())
    for case in cases:
        values = vqa(case["prediction"], case["answers"])
        assert values == dict.fromkeys(values, pytest.approx(case["accuracy"], abs=1e-12))
    assert vqa("red", ["red"] * 2 + ["blue"])["vqa_accuracy"] == pytest.approx(4 / 9)
    assert vqa("red", ["red"] * 2, blank=1)["vqa_accuracy"] == pytest.approx(4 / 9)
    assert vqa("red", ["red"] * 2)["vqa_accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("count", range(2, 11))
def test_any_number_of_annotators_follows_the_formula(count):
    for agreeing in range(count + 1):
        found = vqa("red", ["red"] * agreeing + ["blue"] * (count - agreeing))["vqa_accuracy"]
        own, others = min(1, max(agreeing - 1, 0) / 3), min(1, agreeing / 3)
        expected = (agreeing * own + (count - agreeing) * others) / count
        assert found == pytest.approx(expected, abs=1e-12)


def test_fewer_annotators_are_noted():
    responses, records = [Response("1", "a")], [record(["a"] * 4)]
    assert score_vqa(responses, records).notes == ("1 of 1 records have fewer than 10 annotators",)
    assert score_vqa(responses, [record(["a"] * 9, blank=1)]).notes == ()


@pytest.mark.parametrize(
    ("dataset", "headline"),
    [
        *(("textvqa", "vqa_accuracy_evalai"), ("vizwiz", "vqa_accuracy_evalai")),
        *(("vqav2", "vqa_accuracy_evalai"), ("okvqa", "vqa_accuracy_lavis")),
        ("aokvqa", "direct_answer"),  # as LAVIS counts it
    ],
)
def test_the_headline_is_the_rule_of_the_published_numbers(dataset, headline):
    name = BENCHMARKS[dataset].metric
    values = get_metric(name)([Response("1", "two")], [record(["two"] * 10)]).values
    assert next(iter(values)) == name == headline
    if name in RULES:
        assert set(values) == set(RULES)
        assert values == {"vqa_accuracy": 1, "vqa_accuracy_lavis": 0, "vqa_accuracy_evalai": 1}


@pytest.mark.parametrize("score", [score_vqa, score_direct_answer, score_ivqa])
@pytest.mark.parametrize("count", [1, 11])
def test_other_numbers_of_annotators_are_refused(score, count):
    with pytest.raises(MetricError, match=f"'1' with {count}: score them by exact_match"):
        score([Response("1", "red")], [record(["red"] * count)])


def test_direct_answers_are_compared_as_they_are():
    def score(text, answers):
        return score_direct_answer([Response("1", text)], [record(answers)]).values["direct_answer"]

    answers = ["red", "red", "blue", "Green", "Green", "Green"]
    assert [score(text, answers) for text in ("red", "blue", "Green", "green", "red.")] == [
        *(pytest.approx(2 / 3), pytest.approx(1 / 3), 1, 0, 0)
    ]


def test_two_of_five_make_an_answer_right():
    def score(text):
        answers = ["a pan", "Pan", "pot", "two pots", "skillet"]
        return score_ivqa([Response("1", text)], [record(answers)]).values["ivqa_accuracy"]

    assert [score(text) for text in ("the pan.", "pot", "2 pots", "lid")] == [1, 0.5, 0.5, 0]


def test_textvqa_predictions_have_their_published_score(shared):
    """LLaVA-1.5-13B: 61.3 in its paper (arXiv 2310.03744), by the server's tool."""
    folder = shared / "data" / "vqa" / "textvqa"
    rows = json.loads((folder / "val_annotations_vqa_format.json").read_text())["annotations"]
    records = [
        record([each["answer"] for each in row["answers"]], str(row["question_id"])) for row in rows
    ]
    given = json.loads((folder / "llava-v1.5-13b_val_results_vqa_format.json").read_text())
    responses = [Response(str(each["question_id"]), each["answer"]) for each in given]
    scores = score_vqa(responses, records)
    assert round(100 * scores.values["vqa_accuracy_evalai"], 1) == 61.3
    # It writes names in capitals, which the official tool punishes where all annotators agree.
    assert scores.values["vqa_accuracy"] < scores.values["vqa_accuracy_lavis"] < 0.6
    assert {len(each) for each in scores.samples.values()} == {5000}


def test_okvqa_predictions_have_their_recorded_scores(shared):
    """The labels are reduced: 0.667 stands for two annotators of ten, 1 for four or more."""
    folder = shared / "data" / "vqa" / "okvqa"
    questions = json.loads((folder / "okvqa_val_softlabels_lxmert.json").read_text())
    note = json.loads((folder.parent / "golden_scores.json").read_text())["okvqa_softlabel_note"]
    found = {}
    for path in (folder / "pica_results").glob("*.json"):
        given = {each["question_id"]: each["answer"] for each in json.loads(path.read_text())}
        samples = []
        for question in questions:
            said = Counter({text: 4 if v == 1 else 2 for text, v in question["label"].items()})
            annotators = [*said.elements(), *[""] * (10 - said.total())]
            samples.append(leave_one_out(given[question["question_id"]], annotators))
        name = path.name.partition("_gpt3_")[2].partition("_n16")[0]
        found[name] = f"{100 * mean(samples):.2f}"
    assert found == {"5GT": "54.07", "VinVL": "47.11", "VinVLTag": "48.39"}
    assert "54.07 / 47.11 / 48.39" in note
