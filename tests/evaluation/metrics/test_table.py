"""Properties of every metric."""

import random
import string

import pytest

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.by_kind import INSTRUCTBLIP
from jax_instructblip.evaluation.metrics.metric import MetricError, Response
from jax_instructblip.evaluation.metrics.table import METRICS, get_metric

COUNT = 24
WORDS = ("red", "two dogs", "a Cup.", "it's", "blue/green", "1,000", "on the table", "Tom's house")
# Without METEOR, which takes long to start, the captions are those of `cider`.
NAMES = sorted(set(METRICS) - {"captions"})
# The best values that there can be, beside 1; of a set without repeated captions.
BEST = {"cider": 10.0, "mean_rank": 1.0, "yes_ratio": 0.5, "true_positives": COUNT / 2}
BEST |= {"false_positives": 0.0, "true_negatives": COUNT / 2, "false_negatives": 0.0}


def make(name, rng, perfect):
    """Responses and records such as the metric takes."""
    pairs = []
    for number in range(COUNT):
        answers, choices, correct, scores = (), (), -1, ()
        text = ""
        if name == "cider":
            # Words of their own, so that each counts in full.
            answers = (" ".join(f"{letter}{number}x" for letter in string.ascii_lowercase[:9]),)
        elif name in ("accuracy", "auroc", "mrr", "science_qa"):
            choices = ("yes", "no") if name == "auroc" else WORDS[: 3 + number % 5]
            correct = number % 2 if name == "auroc" else rng.randrange(len(choices))
            answers = (choices[correct],)
            scores = [rng.choice([-2.0, -1.5, -1.0, -0.5]) for _ in choices]
            if perfect:
                scores[correct] = 0.0
        elif name == "yes_no":
            answers = (("yes", "no")[number % 2],)
        elif name == "exact_match":
            answers = (WORDS[number % len(WORDS)],)
        else:
            count = 5 if name == "ivqa_accuracy" else 10
            first = rng.choice(WORDS)
            answers = tuple([first] * 4 + rng.choices(WORDS, k=count - 4))
        if not scores:
            text = answers[0] if perfect else rng.choice([*WORDS, "yes", "no", answers[0]])
        record = Record(str(number), ("a.jpg",), "What?", answers, choices=choices, correct=correct)
        pairs.append((Response(str(number), text, tuple(scores)), record))
    responses, records = zip(*pairs, strict=True)
    return list(responses), list(records)


def test_every_dataset_names_a_metric_that_there_is():
    named = {row.metric for row in INSTRUCTBLIP.values()} - {""}
    assert named <= set(METRICS)
    others = {"captions", "family_accuracy", "vqa_accuracy"}
    assert set(METRICS) - named == others


def test_the_nearest_names_are_suggested():
    assert get_metric("mrr") is METRICS["mrr"]
    with pytest.raises(ValueError, match="unknown metric 'vqa_acuracy'; did you mean vqa_accuracy"):
        get_metric("vqa_acuracy")
    with pytest.raises(ValueError, match="unknown metric '###'; known: accuracy, auroc, "):
        get_metric("###")


@pytest.fixture(params=NAMES)
def name(request):
    if request.param == "cider":
        pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap: pip install -e .[eval]")
    return request.param


@pytest.mark.parametrize("seed", range(3))
def test_the_order_changes_nothing(name, seed):
    rng = random.Random(seed)
    responses, records = make(name, rng, perfect=False)
    scores = METRICS[name](responses, records)
    order = rng.sample(range(COUNT), COUNT)
    shuffled = METRICS[name](rng.sample(responses, COUNT), [records[i] for i in order])
    # The caption tools add in the order that they are given.
    assert shuffled.values == pytest.approx(scores.values, rel=1e-12 if name == "cider" else 0)
    for key, samples in scores.samples.items():
        expected = [samples[i] for i in order]
        assert shuffled.samples[key] == pytest.approx(expected, rel=1e-12 if name == "cider" else 0)


def test_right_answers_have_the_best_values_and_others_less(name):
    rng = random.Random(0)
    perfect = METRICS[name](*make(name, rng, perfect=True))
    for key, value in perfect.values.items():
        if key == "vqa_accuracy_lavis":  # which normalises one side alone
            continue
        assert value == pytest.approx(BEST.get(key, 1.0), abs=1e-9), key
    main = next(iter(perfect.values))
    other = METRICS[name](*make(name, rng, perfect=False))
    assert other.values.keys() == perfect.values.keys()
    assert other.values[main] < perfect.values[main]
    assert {len(samples) for samples in perfect.samples.values()} == {COUNT}


def test_bad_input_is_an_error(name):
    responses, records = make(name, random.Random(0), perfect=True)
    bad = [
        ([], []),
        (responses[1:], records),
        ([*responses, responses[0]], records),
        (responses, records[1:]),
        ([Response(records[0].id, "", (float("nan"), 0.0, 0.0)), *responses[1:]], records),
    ]
    for case in bad:
        with pytest.raises(MetricError):
            METRICS[name](*case)
