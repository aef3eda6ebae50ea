"""Visual Dialog metrics: the rank of the right answer among the 100 candidates of each round."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jax_instructblip.data.readers.annotations import field, read_json, require
from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics.choice_scores import with_choices
from jax_instructblip.evaluation.metrics.metric import (
    MetricError,
    Response,
    Scores,
    align,
    summarise,
)

DEPTHS = (1, 5, 10)


def score_ranks(responses: Sequence[Response], records: Sequence[Record]) -> Scores:
    """Returns `mrr`, `r@1`, `r@5`, `r@10` and `mean_rank` of the right answer (rank 1 is best).

    On equal scores the candidate that is listed first ranks higher. A response without text and
    scores ranks the right answer last.

    Raises:
      MetricError: a response has text but no scores.
    """
    ranks = []
    for response, record in with_choices(responses, records):
        if response.text and not len(response.scores):
            raise MetricError(f"{response.id!r} was generated; MRR needs scores of all candidates")
        ranks.append(_rank(response, record))
    recalls = {f"r@{depth}": [float(rank <= depth) for rank in ranks] for depth in DEPTHS}
    return summarise({"mrr": [1 / rank for rank in ranks], **recalls, "mean_rank": ranks})


def score_ndcg(
    responses: Sequence[Response],
    records: Sequence[Record],
    relevance: Mapping[str, Sequence[float]],
) -> Scores:
    """Returns `ndcg` over the dialogue rounds that annotators have judged, one per image.

    `relevance` maps the id of a judged record to the share of judges who accepted each candidate
    (`read_relevance`). Only the first k candidates of the ranking count, k being the number of
    candidates with relevance above 0; the one at rank i adds relevance / log2(i + 1).

    Raises:
      MetricError: no record is judged, or a judged one has another number of candidates, or none
        that any judge accepted.
    """
    judged = [record for record in records if record.id in relevance]
    if not judged:
        raise MetricError(f"none of {len(records)} records was judged: are they of another split?")
    wanted = {record.id for record in judged}
    responses = [response for response in responses if response.id in wanted]
    gains = []
    for response, record in align(responses, judged, need_answers=False):
        gain = np.asarray(relevance[record.id], float)
        if len(gain) != len(response.scores) or not gain.any():
            raise MetricError(
                f"{record.id!r} has {len(response.scores)} scores and {len(gain)} judgements, "
                f"{np.count_nonzero(gain)} of them above 0; expected as many, and at least one"
            )
        gains.append(_dcg(gain[best_first(response.scores)]) / _dcg(np.sort(gain)[::-1]))
    return summarise({"ndcg": gains})


def read_relevance(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Reads Visual Dialog's dense annotations; returns relevances per candidate by record id.

    The file is `[{"image_id", "round_id", "gt_relevance": [number per candidate]}]`; rounds count
    from 1. A record id is `IMAGE:ROUND`, as our Visual Dialog reader names records.
    """
    relevance = {}
    for number, row in enumerate(read_json(Path(path), list)):
        where = f"{path}: row {number}"
        require(row, dict, where)
        name = "gt_relevance" if "gt_relevance" in row else "relevance"  # val; train
        gains = field(row, name, list, where)
        record = f"{field(row, 'image_id', int, where)}:{field(row, 'round_id', int, where)}"
        relevance[record] = [float(require(gain, (int, float), where)) for gain in gains]
    return relevance


def best_first(scores: Sequence[float]) -> np.ndarray:
    """Returns the indices of the scores from highest to lowest; ties keep their order."""
    return np.argsort(-np.asarray(scores, float), kind="stable")


def _rank(response: Response, record: Record) -> int:
    if not len(response.scores):
        return len(record.choices)
    return int(np.flatnonzero(best_first(response.scores) == record.correct)[0]) + 1


def _dcg(gains: np.ndarray) -> float:
    """Returns the DCG of relevances in ranking order, over the first k, k = number above 0."""
    count = np.count_nonzero(gains)
    return float((gains[:count] / np.log2(np.arange(count) + 2)).sum())
