"""Metrics of answers chosen among candidates: accuracy, AUROC, and POPE's yes/no scores."""

import math
from collections.abc import Sequence

import numpy as np

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics.exact_match import normalise
from jax_instructblip.evaluation.metrics.metric import (
    MetricError,
    Response,
    Scores,
    align,
    mean,
    summarise,
)

# Answers that count as equal: a model may say yes to a statement with the choices true and false.
_SAME = {"yes": "true", "no": "false"}
POSITIVE = ("true", "yes")  # choices that are the positive class of AUROC
COUNTS = ("true_positives", "false_positives", "true_negatives", "false_negatives")


def score_accuracy(responses: Sequence[Response], records: Sequence[Record]) -> Scores:
    """Returns `accuracy`, the share of right choices: ScienceQA, IconQA, VSR, A-OKVQA.

    In a ranking the candidate with the highest score is chosen, the first on a tie. A generated
    answer chooses the candidate equal to it, ignoring case ("yes" equals "true", "no" equals
    "false"); if none is equal, it is wrong.
    """
    pairs = with_choices(responses, records)
    return summarise({"accuracy": [float(_chosen(*pair) == pair[1].correct) for pair in pairs]})


def score_auroc(responses: Sequence[Response], records: Sequence[Record]) -> Scores:
    """Returns `auroc`, the area under the ROC curve, and `accuracy`: Hateful Memes.

    Each record has two choices, one of them "yes" or "true". Records are ranked by the score of
    that choice minus the score of the other; ties count half. A response without text and scores
    gets the worst possible rank.

    Raises:
      MetricError: a response has text but no scores, or a record has other choices.
    """
    pairs = with_choices(responses, records)
    margins, positives = [], []
    for response, record in pairs:
        yes = _positive(record)
        positives.append(record.correct == yes)
        if len(response.scores):
            margins.append(float(response.scores[yes]) - float(response.scores[1 - yes]))
        elif response.text:
            raise MetricError(f"{response.id!r} was generated; AUROC needs scores of both choices")
        else:
            margins.append(-np.inf if positives[-1] else np.inf)
    right = tuple(float(_chosen(*pair) == pair[1].correct) for pair in pairs)
    values = {"auroc": auroc(margins, positives), "accuracy": mean(right)}
    errors = {"auroc": auroc_error(values["auroc"], sum(positives), len(pairs) - sum(positives))}
    return Scores(values, {"accuracy": right, "margin": tuple(margins)}, errors=errors)


def auroc(scores: Sequence[float], positives: Sequence[bool]) -> float:
    """Returns the probability that a positive scores higher than a negative; ties count half.

    Raises:
      MetricError: there are no positives or no negatives.
    """
    labels = np.asarray(positives, bool)
    count, others = int(labels.sum()), int((~labels).sum())
    if not count or not others:
        raise MetricError(
            f"AUROC of {count} positive and {others} negative records is not defined: it needs both"
        )
    _, places, repeats = np.unique(np.asarray(scores), return_inverse=True, return_counts=True)
    # Tied values all get the mean of their ranks.
    ranks = np.cumsum(repeats) - (repeats - 1) / 2
    above = ranks[places][labels].sum() - count * (count + 1) / 2
    return float(above / (count * others))


def auroc_error(area: float, positives: int, negatives: int) -> float:
    """Returns the standard error of an area under the ROC curve (Hanley and McNeil, 1982)."""
    both_above, both_below = area / (2 - area), 2 * area**2 / (1 + area)
    spread = (
        area * (1 - area)
        + (positives - 1) * (both_above - area**2)
        + (negatives - 1) * (both_below - area**2)
    )
    return math.sqrt(max(spread, 0.0) / (positives * negatives))


def class_scores(scores: Sequence[float], words: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """Returns the log-probability of each choice: the log of the sum over its words.

    `words` are the words that stand for each choice (`Protocol.words`), `scores` their
    log-probabilities in one flat list. The InstructBLIP paper does not say how it joined the words
    of a choice; summing the probabilities is our decision.
    """
    if len(scores) != sum(map(len, words)):
        raise MetricError(f"{len(scores)} scores of {sum(map(len, words))} words: one each")
    bounds = np.cumsum([0, *map(len, words)])
    groups = zip(bounds[:-1], bounds[1:], strict=True)
    return tuple(float(np.logaddexp.reduce(scores[start:end])) for start, end in groups)


def score_yes_no(responses: Sequence[Response], records: Sequence[Record]) -> Scores:
    """Returns POPE's scores of the answer "yes": F1, accuracy, precision, recall and counts.

    By name: `f1`, `accuracy`, `precision`, `recall`, `yes_ratio` (the share of "yes" answers),
    `true_positives` and the like. A generated answer counts as "no" if its first sentence has the
    word "no" or "not", and as "yes" otherwise, even if empty (as in LLaVA's scorer).

    If the records are of several kinds of questions (`DATASET/KIND` is their task), each kind has
    its own values (`f1/KIND`); those without a kind are then means over the kinds, as published,
    and sums of the counts.
    """
    pairs = align(responses, records)
    said = np.array([_says_yes(response.text) for response, _ in pairs])
    true = np.array([_truth(record) for _, record in pairs])
    of_kind: dict[str, list[int]] = {}
    for number, (_, record) in enumerate(pairs):
        of_kind.setdefault(record.task.partition("/")[2], []).append(number)
    values = {kind: _yes_no_values(said[rows], true[rows]) for kind, rows in of_kind.items()}
    samples = {"accuracy": tuple((said == true).astype(float).tolist())}
    if len(values) == 1:
        return Scores(next(iter(values.values())), samples)
    joined: dict[str, float] = {}
    for name in next(iter(values.values())):
        of_kinds = [each[name] for each in values.values()]
        joined[name] = math.fsum(of_kinds) if name in COUNTS else mean(of_kinds)
    for kind, of_one in sorted(values.items()):
        joined |= {f"{name}/{kind}": value for name, value in of_one.items()}
    return Scores(joined, samples)


def _yes_no_values(said: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Returns the values of `score_yes_no`, by name, of one kind of questions."""
    hits, right = int((said & true).sum()), said == true
    precision = hits / said.sum() if said.any() else 0.0
    recall = hits / true.sum() if true.any() else 0.0
    return {
        "f1": float(2 * precision * recall / (precision + recall)) if hits else 0.0,
        "accuracy": float(right.mean()),
        "precision": float(precision),
        "recall": float(recall),
        "yes_ratio": float(said.mean()),
        "true_positives": float(hits),
        "false_positives": float((said & ~true).sum()),
        "true_negatives": float((~said & ~true).sum()),
        "false_negatives": float((~said & true).sum()),
    }


def with_choices(
    responses: Sequence[Response], records: Sequence[Record]
) -> list[tuple[Response, Record]]:
    """Returns the pairs of `align` after checking that each record has choices and a right one.

    Raises:
      MetricError: a record has no choices or no known right one, or a response's scores are not
        one per choice.
    """
    pairs = align(responses, records, need_answers=False)
    hidden = [record.id for _, record in pairs if record.correct < 0]
    if hidden:
        raise MetricError(
            f"{len(hidden)} records have no choices, or do not say which is right, such as "
            f"{hidden[0]!r}"
        )
    for response, record in pairs:
        if len(response.scores) not in (0, len(record.choices)):
            raise MetricError(
                f"{response.id!r} has {len(response.scores)} scores, but {len(record.choices)} "
                "choices: one score a choice, in their order"
            )
    return pairs


def _chosen(response: Response, record: Record) -> int:
    """Returns the index of the choice that the response selects; -1 if it equals none."""
    if len(response.scores):
        return int(np.argmax(response.scores))
    meanings = [_meaning(choice) for choice in record.choices]
    answer = _meaning(response.text)
    return meanings.index(answer) if answer in meanings else -1


def _meaning(text: str) -> str:
    return _SAME.get(normalise(text), normalise(text))


def _positive(record: Record) -> int:
    positive = [i for i, choice in enumerate(record.choices) if normalise(choice) in POSITIVE]
    if len(record.choices) != 2 or len(positive) != 1:
        raise MetricError(
            f"{record.id!r} has the choices {list(record.choices)}; AUROC expects two, one of them "
            f"{' or '.join(POSITIVE)}"
        )
    return positive[0]


def _says_yes(text: str) -> bool:
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _truth(record: Record) -> bool:
    if record.answers[0] not in ("yes", "no"):
        raise MetricError(f"{record.id!r} is answered {record.answers[0]!r}, expected yes or no")
    return record.answers[0] == "yes"
