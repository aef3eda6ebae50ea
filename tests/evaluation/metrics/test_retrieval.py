import numpy as np
import pytest

from jax_instructblip.evaluation.metrics.retrieval import hits_at, mean_recall, recalls


def test_recalls_by_hand():
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.7], [0.3, 0.3, 0.1]])
    assert recalls(scores, np.eye(3, dtype=bool)) == {"r1": 2 / 3, "r5": 1.0, "r10": 1.0}
    many = np.arange(12, dtype=float)[None].repeat(2, 0)
    right = np.zeros((2, 12), bool)
    right[0, 7], right[1, 1] = True, True  # the fifth and the eleventh from the end
    assert recalls(many, right) == {"r1": 0.0, "r5": 0.5, "r10": 0.5}
    right[1, [3, 2]] = True  # the nearest of several right ones counts: the ninth
    assert recalls(many, right) == {"r1": 0.0, "r5": 0.5, "r10": 1.0}


def test_of_equal_scores_the_first_is_nearer():
    scores, right = np.zeros((1, 3)), np.array([[False, True, False]])
    assert recalls(scores, right)["r1"] == 0.0
    assert recalls(scores, right[:, ::-1][:, [1, 0, 2]])["r1"] == 1.0


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2), bool), "shape"),
        (np.zeros((0, 3)), np.zeros((0, 3), bool), "shape"),
        (np.zeros((2, 2)), np.array([[True, False], [False, False]]), r"1 queries .*: \[1\]"),
    ],
)
def test_what_cannot_be_scored_is_said(scores, right, message):
    with pytest.raises(ValueError, match=message):
        recalls(scores, right)


def test_what_is_not_among_the_candidates_is_not_found():
    ranked = np.array([[False, True], [False, False], [True, False]])
    hits = hits_at(ranked)
    assert hits["r1"].tolist() == [0, 0, 1] and hits["r10"].tolist() == [1, 0, 1]


def test_mean_recall_of_both_directions():
    assert mean_recall({"image_to_text/r1": 0.5, "text_to_image/r1": 0.2}) == pytest.approx(0.35)
