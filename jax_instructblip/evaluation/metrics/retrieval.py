"""Recall at k of retrieval: the share of queries with a right candidate among the k best."""

from collections.abc import Mapping

import numpy as np

RANKS = (1, 5, 10)
FORTH, BACK = "image_to_text", "text_to_image"


def recalls(scores: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Returns `r1`, `r5` and `r10`, from 0 to 1.

    Args:
      scores: `[Q, C]` of queries and candidates, higher is better; on a tie the first ranks higher.
      right: `[Q, C]` bool, the right candidates of each query.

    Raises:
      ValueError: a query has no right candidate, or the arrays are empty or of different shapes.
    """
    if scores.shape != right.shape or not scores.size:
        raise ValueError(
            f"scores have shape {scores.shape} and right has {right.shape}, expected the same "
            "[Q, C], with at least one query and one candidate"
        )
    if lacking := np.flatnonzero(~right.any(axis=1)).tolist():
        raise ValueError(f"{len(lacking)} queries have no right candidate: {lacking[:10]}")
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = hits_at(np.take_along_axis(right, order, axis=1))
    return {name: float(each.mean()) for name, each in hits.items()}


def hits_at(ranked: np.ndarray) -> dict[str, np.ndarray]:
    """Returns `r1`, `r5` and `r10` of each query, `[Q]` float64, 0 or 1.

    `ranked` `[Q, K]` bool tells whether each of the K best candidates of a query, best first, is
    right. A right candidate that is not among the K counts as not found.
    """
    return {f"r{rank}": ranked[:, :rank].any(axis=1).astype(float) for rank in RANKS}


def mean_recall(values: Mapping[str, float]) -> float:
    """Returns the mean of `image_to_text/r1` and `text_to_image/r1`, one number for a model."""
    return (values[f"{FORTH}/r1"] + values[f"{BACK}/r1"]) / 2
