"""Scores of reviews: published ones computed again, and none where too many are missing."""

import json

import pytest

from jax_instructblip.evaluation.judge_scores import (
    RelativeScore,
    Review,
    describe_scores,
    parse_scores,
    read_reviews,
    relative_scores,
)
from jax_instructblip.evaluation.metrics.metric import MetricError

# Vicuna-13B beside another model on its 80 questions, https://lmsys.org/blog/2023-03-30-vicuna
PUBLISHED = {"alpaca-13b": (583.0, 704.0), "gpt35": (693.0, 638.0)}
# Mathematics has a rule of its own: the scores stand at the end of the review.
MATHEMATICS = ("68", "69", "70")


@pytest.mark.parametrize("other", PUBLISHED)
def test_published_reviews_give_the_published_totals(shared, other):
    path = shared / f"data/llava/review/review_{other}_vicuna-13b.jsonl"
    reviews = read_reviews(path)
    reference, model = PUBLISHED[other]
    score = relative_scores(reviews)["all"]
    assert score == RelativeScore(
        pytest.approx(100 * model / reference), model / 80, reference / 80, 80, 0
    )
    rows = map(json.loads, path.read_text().splitlines())
    texts = {str(row["question_id"]): row["text"] for row in rows}
    for review in reviews:
        if review.id in MATHEMATICS:
            with pytest.raises(ValueError, match="expected two scores"):
                parse_scores(texts[review.id])
        else:
            assert parse_scores(texts[review.id]) == review.scores


@pytest.mark.parametrize("text", ["8 9.5", "8, 9.5\nBoth", " \n8,9.5 \nAssistant 1", "8  9.5\r\nB"])
def test_two_scores_are_read(text):
    assert parse_scores(text) == (8.0, 9.5)


@pytest.mark.parametrize(
    "text", ["", "8", "8 9 7", "8/10 9/10", "Assistant 1: 8", "nan 8", "-1 -1", "80 90", "8 inf"]
)
def test_anything_else_is_no_score(text):
    with pytest.raises(ValueError, match="expected"):
        parse_scores(text)


def reviews(kind, pairs, missing=0):
    scores = [*pairs, *[None] * missing]
    return [Review(f"{kind}{number}", kind, each) for number, each in enumerate(scores)]


def test_missing_reviews_are_counted_and_never_averaged():
    rows = reviews("b", [(8.0, 4.0)] * 18 + [(4.0, 6.0)], missing=1)
    rows += reviews("a", [(10.0, 9.0)] * 20)
    scores = relative_scores(rows)
    assert list(scores) == ["a", "b", "all"]
    assert scores["b"] == RelativeScore(
        pytest.approx(100 * 78 / 148), pytest.approx(78 / 19), pytest.approx(148 / 19), 20, 1
    )
    assert scores["all"].relative == pytest.approx(100 * (78 + 180) / (148 + 200))


def test_over_five_percent_missing_is_no_score():
    scores = relative_scores(
        reviews("b", [(8.0, 4.0)] * 18, missing=1) + reviews("a", [(5.0, 5.0)])
    )
    assert scores["b"] == RelativeScore(None, 4.0, 8.0, 19, 1)
    assert scores["all"].relative is not None  # 1 of 20
    assert relative_scores(reviews("b", [], missing=2))["all"] == RelativeScore(
        None, None, None, 2, 2
    )
    table = list(describe_scores(scores))
    assert table[1].split() == ["a", "100.0", "5.00", "5.00", "1", "0"]
    assert table[2].split() == ["b", "-", "8.00", "4.00", "19", "1"]
    assert "more than 5%" in table[-1]


def test_reviews_in_llavas_layout(tmp_path):
    path = tmp_path / "r.jsonl"
    rows = [
        {"question_id": 0, "category": "llava_bench_conv", "tuple": [8, 9.5], "content": "8 9.5"},
        {"question_id": 1, "category": "llava_bench_conv", "tuple": [-1, -1]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = "llava_bench_conv"
    assert read_reviews(path) == [Review("0", kind, (8.0, 9.5)), Review("1", kind, None)]
    rows += [{"question_id": 2}, {"tuple": [1, 2]}, {"question_id": 3, "score": [-1, 5]}, 4]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(MetricError) as error:
        read_reviews(path)
    assert [line.split(":")[1] for line in str(error.value).splitlines()[1:]] == [*"3456"]
