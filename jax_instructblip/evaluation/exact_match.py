"""Exact match: the whole answer is right, or nothing is."""

from collections import Counter
from collections.abc import Iterable, Sequence


def normalise(text: str) -> str:
    """`text` in lower case without outer white space."""
    return text.strip().lower()


def is_correct(text: str, answers: Sequence[str]) -> bool:
    """Whether the normalised text equals one of the normalised right answers."""
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
