"""Visual Dialog: the place of the right answer among the hundred candidates of a round."""

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
    """MRR, recall at 1, 5 and 10, and the mean rank of the right answer (1 is best).

    Candidates of equal score come in the order of the record. A response without scores puts the
    right answer last.
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
    """NDCG over the rounds whose candidates were all judged, one an image.

    `relevance` has for the id of each judged record the share of judges that accepted each
    candidate (`read_relevance`). The k best candidates count, k being how many of them anybody
    accepted; the one in place i counts relevance / log2(i + 1).

    Raises:
      MetricError: no record was judged, or one with another number of candidates, or with no
        candidate that anybody accepted.
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
    """The judgements of Visual Dialog's dense annotations, by the ids of the reader's records.

    `[{"image_id", "round_id", "gt_relevance": [number for each candidate]}]`; rounds begin at 1.
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
    """The indices of the scores from the highest to the lowest, equal ones in their order."""
    return np.argsort(-np.asarray(scores, float), kind="stable")


def _rank(response: Response, record: Record) -> int:
    if not len(response.scores):
        return len(record.choices)
    return int(np.flatnonzero(best_first(response.scores) == record.correct)[0]) + 1


def _dcg(gains: np.ndarray) -> float:
    """The DCG of relevances in the order of the ranking; as many count as are above 0."""
    count = np.count_nonzero(gains)
    return float((gains[:count] / np.log2(np.arange(count) + 2)).sum())
