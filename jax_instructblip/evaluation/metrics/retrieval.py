"""Recall at k of retrieval: the share of queries with a right candidate among the k best."""

import numpy as np

RANKS = (1, 5, 10)


def recalls(scores: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Returns `r1`, `r5` and `r10`, from 0 to 1.

    Args:
      scores: [Q, C] of queries and candidates, higher is better; on a tie the first ranks higher.
      right: [Q, C] bool, the right candidates of each query.

    Raises:
      ValueError: a query has no right candidate, or the arrays are empty or of different shapes.
    """
    if scores.shape != right.shape or not scores.size:
        raise ValueError(f"scores have shape {scores.shape}, right ones {right.shape}")
    if lacking := np.flatnonzero(~right.any(axis=1)).tolist():
        raise ValueError(f"{len(lacking)} queries have no right candidate: {lacking[:10]}")
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(right, order, axis=1)
    best = ranked.argmax(axis=1)  # rank of the best right candidate, from 0
    return {f"r{k}": float((best < k).mean()) for k in RANKS}
