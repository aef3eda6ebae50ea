"""Exact match metrics: an answer is right only if the whole text equals a right answer."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics import vqa_text
from jax_instructblip.evaluation.metrics.metric import (
    Response,
    Scores,
    align,
    mean,
    standard_error,
    summarise,
)

NO_FAMILY = "all"  # the family of records without `task`


def score_exact_match(responses: Sequence[Response], records: Sequence[Record]) -> Scores:
    """Returns the share of answers that equal a right answer, after two normalisations.

        exact_match  both texts normalised by the VQA tools, as LAVIS scores GQA and video questions
        plain_match  only lower case and stripped white space (`is_correct`)

    The paper does not say how OCR-VQA was normalised; that dataset's official rule is equality.
    """
    exact, plain = [], []
    for response, record in align(responses, records):
        right = {vqa_text.normalise(answer) for answer in record.answers}
        exact.append(float(vqa_text.normalise(response.text) in right))
        plain.append(float(is_correct(response.text, record.answers)))
    return summarise({"exact_match": exact, "plain_match": plain})


def score_families(responses: Sequence[Response], records: Sequence[Record]) -> Scores:
    """Returns the share of right answers (`is_correct`) by family of questions.

    accuracy         the unweighted mean over the families
    accuracy/FAMILY  one family: the records with the same `Record.task`
    """
    by_family: dict[str, list[float]] = {}
    samples = []
    for response, record in align(responses, records):
        samples.append(float(is_correct(response.text, record.answers)))
        by_family.setdefault(record.task or NO_FAMILY, []).append(samples[-1])
    shares = {family: mean(by_family[family]) for family in sorted(by_family)}
    errors = {each: standard_error(by_family[each]) for each in shares if len(by_family[each]) > 1}
    whole = {f"accuracy/{family}": error for family, error in errors.items()}
    if len(errors) == len(shares):
        squares = math.fsum(error**2 for error in errors.values())
        whole["accuracy"] = math.sqrt(squares) / len(shares)
    values = {f"accuracy/{family}": share for family, share in shares.items()}
    return Scores(
        {"accuracy": mean(shares.values()), **values},
        {"accuracy": tuple(samples)},
        errors=whole,
    )


def normalise(text: str) -> str:
    """Returns `text` in lower case, stripped of outer white space."""
    return text.strip().lower()


def is_correct(text: str, answers: Sequence[str]) -> bool:
    """Returns True if `text` equals one of `answers`, all normalised."""
    return normalise(text) in {normalise(answer) for answer in answers}


def majority_answer(truths: Iterable[Sequence[str]]) -> str:
    """Returns the normalised answer that is right for most questions; alphabetical on a tie.

    `truths` are the right answers of each question. Always giving this answer is the strongest
    guess that uses neither image nor question.
    """
    counts = Counter(
        answer for answers in truths for answer in sorted({normalise(each) for each in answers})
    )
    if not counts:
        raise ValueError("there are no answers to choose from")
    return min(counts, key=lambda answer: (-counts[answer], answer))
