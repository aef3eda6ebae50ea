import numpy as np
import pytest

from jax_instructblip.inference import matching
from jax_instructblip.inference.matching import ABSENT, Ranked


def test_the_nearest_come_first_and_of_equal_ones_the_first(monkeypatch):
    monkeypatch.setattr(matching, "ROWS", 2)  # three rows in two parts
    scores = np.array([[1, 3, 3, 2], [0, 0, 0, 0], [4, 1, 2, 3]], np.float32)
    assert matching.nearest(scores, 2).tolist() == [[1, 2], [0, 1], [0, 3]]
    assert matching.nearest(scores, 9).shape == (3, 4)


def test_an_image_is_matched_with_its_nearest_and_those_it_is_nearest_to():
    of_images = np.array([[0], [0], [1]])
    of_texts = np.array([[1, 0], [1, 2], [2, 0]])
    pairs = matching.pairs(of_images, of_texts)
    assert [each.tolist() for each in pairs] == [[0, 2], [0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("counts", "most", "size"),
    [([128] * 4, 128, 128), ([1, 1, 1], 128, 1), ([700, 650], 128, 64), ([90] * 9, 64, 32)],
)
def test_blocks_are_as_large_as_padding_allows(counts, most, size):
    assert matching.block_size(counts, most) == size
    padded = sum(-(-count // size) * size for count in counts)
    assert padded <= matching.WASTE * sum(counts)


def test_blocks_hold_each_pair_once():
    texts = [np.arange(5), np.arange(2) + 7]
    blocks = list(matching.plan_blocks([1, 0], texts, 2))
    assert [(b.image, b.texts.tolist()) for b in blocks] == [
        *((1, [7, 8]), (0, [0, 1]), (0, [2, 3]), (0, [4]))
    ]


def test_a_score_is_match_plus_similarity_or_the_match_alone():
    columns = np.array([[0, 2]])
    near, matches = np.array([[0.5, 0.4]], np.float32), np.array([[1.0, 1.05]], np.float32)
    both = matching.rerank(columns, near, matches, itm_only=False)
    assert both.columns.tolist() == [[0, 2]] and both.scores[0, 0] == pytest.approx(1.5)
    alone = matching.rerank(columns, near, matches, itm_only=True)
    assert alone.columns.tolist() == [[2, 0]] and alone.scores[0, 0] == pytest.approx(1.05)
    scores = matching.spread(Ranked(both.columns, both.scores), 3)
    assert scores[0, 1] == ABSENT and scores[0, 2] == pytest.approx(1.45)
