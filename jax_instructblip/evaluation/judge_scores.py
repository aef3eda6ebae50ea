"""Scores that a judge gave to pairs of answers, and the relative score of LLaVA-Bench.

A review begins with a line of two numbers from 0 to 10: the reference's, then the model's. The
relative score is 100 x mean(model) / mean(reference), of each kind of question and of all.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_instructblip import files, stores
from jax_instructblip.evaluation.metrics.metric import MetricError

MAX_MISSING = 0.05  # part of the questions; with more missing there is no score
BEST = 10.0
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Review:
    """The judge's scores of two answers to one question.

    Attributes:
      id: the question's id.
      kind: the kind of question, its category in LLaVA's files; "" if it is not known.
      scores: of the reference and of the model, each from 0 to 10; None if the judge gave none.
    """

    id: str
    kind: str
    scores: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class RelativeScore:
    """The relative score of one kind of questions.

    Attributes:
      relative: 100 x model / reference; None if `reference` is 0, or more than `MAX_MISSING` (5 %)
        of the reviews are missing.
      model: mean of the model's scores; None if there is no review.
      reference: mean of the reference's scores; None if there is no review.
      questions: number of questions.
      missing: questions without a review; they are in none of the means.
    """

    relative: float | None
    model: float | None
    reference: float | None
    questions: int
    missing: int


def parse_scores(text: str) -> tuple[float, float]:
    """Returns the scores of reference and model in the first line of a review.

    Raises:
      ValueError: the line is not two numbers from 0 to 10, between them spaces or a comma.
    """
    line = text.strip().partition("\n")[0]
    try:
        first, second = map(float, line.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"it begins with {line[:60]!r}, expected two scores") from None
    if not (0 <= first <= BEST and 0 <= second <= BEST):
        raise ValueError(f"the scores are {first:g} and {second:g}, expected 0 to {BEST:g}")
    return first, second


def relative_scores(reviews: Sequence[Review]) -> dict[str, RelativeScore]:
    """Returns the score by kind, in alphabetical order, and at last, as "all", of all questions.

    A review without a kind counts in "all" alone.
    """
    kinds = sorted({review.kind for review in reviews if review.kind})
    groups = {kind: [each for each in reviews if each.kind == kind] for kind in kinds}
    return {kind: _score(group) for kind, group in (groups | {ALL: list(reviews)}).items()}


def _score(reviews: Sequence[Review]) -> RelativeScore:
    pairs = [review.scores for review in reviews if review.scores is not None]
    missing = len(reviews) - len(pairs)
    if not pairs:
        return RelativeScore(None, None, None, len(reviews), missing)
    reference, model = (math.fsum(each) / len(pairs) for each in zip(*pairs, strict=True))
    known = missing <= MAX_MISSING * len(reviews) and reference > 0
    relative = 100 * model / reference if known else None
    return RelativeScore(relative, model, reference, len(reviews), missing)


def describe_scores(scores: Mapping[str, RelativeScore]) -> Iterator[str]:
    """Yields the lines of a table of `relative_scores`, a row for each kind."""
    width = max(map(len, scores))
    yield f"{'':{width}}  relative  reference  model  questions  missing"
    for kind, score in scores.items():
        relative, reference, model = (
            "-" if each is None else format(each, ".1f" if index == 0 else ".2f")
            for index, each in enumerate((score.relative, score.reference, score.model))
        )
        yield (
            f"{kind:{width}}  {relative:>8}  {reference:>9}  {model:>5}  {score.questions:9}  "
            f"{score.missing:7}"
        )
    if any(score.relative is None for score in scores.values()):
        yield (
            f"-: no score, for more than {MAX_MISSING:.0%} of the reviews are missing, or all "
            "scores of the reference are 0"
        )


def read_reviews(path: str | os.PathLike[str]) -> list[Review]:
    r"""Returns the reviews in a file of JSON lines, in LLaVA's layout.

        {"question_id": 0, "category": "conv", "content": "8 9\n...", "tuple": [8.0, 9.0]}

    `tuple` may be called `score`; `category` may be absent. Scores of -1 stand for none.

    Raises:
      MetricError: lists all lines that are no reviews; or the file is empty.
    """
    path = stores.input_path(path, "the file of reviews")
    reviews, problems = [], []
    for number, fields, reason in files.scan_jsonl(path):
        try:
            if reason:
                raise ValueError(reason)
            reviews.append(_review(fields))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise MetricError("\n  ".join([f"{len(problems)} lines are no reviews:", *problems]))
    if not reviews:
        raise MetricError(
            f"{path} holds no reviews: it is empty; expected lines with question_id and tuple"
        )
    return reviews


def _review(fields: Any) -> Review:
    if not isinstance(fields, dict) or "question_id" not in fields:
        raise ValueError("expected an object with question_id and tuple")
    kind = fields.get("category", "")
    if not isinstance(kind, str):
        raise ValueError(f"category is {files.kind_of(kind)}, expected text")
    pair: Any = fields.get("tuple", fields.get("score"))
    numbers = isinstance(pair, list) and all(type(each) in (int, float) for each in pair)
    if not numbers or len(pair) != 2:
        raise ValueError(f"tuple is {files.kind_of(pair)}, expected two scores")
    if pair == [-1, -1]:
        return Review(str(fields["question_id"]), kind, None)
    if not all(0 <= each <= BEST for each in pair):
        raise ValueError(f"tuple is {pair}, expected scores from 0 to {BEST:g}")
    return Review(str(fields["question_id"]), kind, (float(pair[0]), float(pair[1])))
