"""Exact match: the whole answer is right, or nothing is."""

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

NO_FAMILY = "all"  # the family of records that name none


def score_exact_match(responses: Sequence[Response], records: Sequence[Record]) -> Scores:
    """The share of answers that equal a right one, by two normalisations.

        exact_match  that of the VQA tools on both sides, as LAVIS scores GQA and video questions
        plain_match  lower case and outer white space alone (`is_correct`)

    How InstructBLIP normalised the answers of OCR-VQA is not known; its official rule is equality.
    """
    exact, plain = [], []
    for response, record in align(responses, records):
        right = {vqa_text.normalise(answer) for answer in record.answers}
        exact.append(float(vqa_text.normalise(response.text) in right))
        plain.append(float(is_correct(response.text, record.answers)))
    return summarise({"exact_match": exact, "plain_match": plain})


def score_families(responses: Sequence[Response], records: Sequence[Record]) -> Scores:
    """The share of answers that are right (`is_correct`), by family of questions.

    accuracy         the mean over the families, each counting alike
    accuracy/FAMILY  of one family (`Record.task`)
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
    """`text` in lower case without outer white space."""
    return text.strip().lower()


def is_correct(text: str, answers: Sequence[str]) -> bool:
    """Tells whether the normalised text equals one of the normalised right answers."""
    return normalise(text) in {normalise(answer) for answer in answers}


def majority_answer(truths: Iterable[Sequence[str]]) -> str:
    """The one normalised answer that is right most often; the first in the alphabet of equals.

    `truths` are the right answers of each question. Always giving it is the strongest guess that
    looks at neither the image nor the question.
    """
    counts = Counter(
        answer for answers in truths for answer in sorted({normalise(each) for each in answers})
    )
    if not counts:
        raise ValueError("there are no answers to choose from")
    return min(counts, key=lambda answer: (-counts[answer], answer))
