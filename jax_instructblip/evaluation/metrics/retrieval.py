"""Recall at k of a retrieval: the share of queries with a right candidate among the k nearest."""

import numpy as np

RANKS = (1, 5, 10)


def recalls(scores: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """`r1`, `r5` and `r10` in 0 to 1: the highest k scores of each row hold a right one.

    Args:
      scores: [Q, C], the higher the nearer; of equal ones the first counts as nearer.
      right: [Q, C] bool, the right candidates of each query.

    Raises:
      ValueError: a query has no right candidate at all, or there is none.
    """
    if scores.shape != right.shape or not scores.size:
        raise ValueError(f"scores have shape {scores.shape}, right ones {right.shape}")
    if lacking := np.flatnonzero(~right.any(axis=1)).tolist():
        raise ValueError(f"{len(lacking)} queries have no right candidate: {lacking[:10]}")
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(right, order, axis=1)
    best = ranked.argmax(axis=1)  # the rank of the first right one
    return {f"r{k}": float((best < k).mean()) for k in RANKS}
