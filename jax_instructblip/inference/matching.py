"""The pairs of a re-ranking: which images and texts are matched, and in blocks of what shape.

near [N, M] --nearest--> the k nearest texts of each image, and images of each text
--pairs--> of each image the texts it is matched with, by either of them
--plan_blocks--> blocks (image, up to T texts), so that one program serves all of them
logits [N, M] --rerank--> each query's candidates, best first
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

ABSENT = -100.0  # score of a pair that was not re-ranked, as released
WASTE = 1.1  # rows that are computed for each that is asked for, at most
ROWS = 1_000  # of a matrix that are sorted at once: the order takes twice its memory


class Ranked(NamedTuple):
    """Candidates of each query, best first, and their scores."""

    columns: np.ndarray  # [R, k] int32
    scores: np.ndarray  # [R, k] float32


class Block(NamedTuple):
    """Texts that are matched with one image at once."""

    image: int
    texts: np.ndarray  # [t], at most as many as the block's size


def nearest(scores: np.ndarray, k: int) -> np.ndarray:
    """The columns `[R, min(k, C)]` int32 of the k best `scores` `[R, C]` of each row, best first.

    Of equal scores the first comes first. A score that is no number counts as the lowest.
    """
    parts = [
        np.argsort(-scores[start : start + ROWS], axis=1, kind="stable")[:, :k].astype(np.int32)
        for start in range(0, len(scores), ROWS)
    ]
    return np.concatenate(parts)


def pairs(of_images: np.ndarray, of_texts: np.ndarray) -> list[np.ndarray]:
    """The numbers of the texts that each image is matched with, in ascending order.

    They are its nearest texts, `of_images` `[N, k]`, and the texts that have it among their nearest
    images, `of_texts` `[M, k]`.
    """
    counts = np.zeros((len(of_images), len(of_texts)), bool)
    np.put_along_axis(counts, of_images, True, axis=1)
    np.put_along_axis(counts.T, of_texts, True, axis=1)
    return [np.flatnonzero(row).astype(np.int32) for row in counts]


def block_size(counts: Sequence[int], most: int) -> int:
    """The number of texts in a block: the largest power of two, up to `most`, that pads little.

    Padding adds at most a tenth to the rows that are computed, or the size is 1.

    `counts` has the number of texts of each image.
    """
    total, size = sum(counts), 1
    while 2 * size <= most:
        padded = sum(-(-count // (2 * size)) for count in counts) * 2 * size
        if padded > WASTE * total:
            break
        size *= 2
    return size


def plan_blocks(numbers: Sequence[int], texts: Sequence[np.ndarray], size: int) -> Iterator[Block]:
    """The texts of the images `numbers` in blocks of at most `size`, image by image.

    `texts[i]` has the numbers of the texts that image i is matched with.
    """
    for number in numbers:
        for start in range(0, len(texts[number]), size):
            yield Block(number, texts[number][start : start + size])


def rerank(columns: np.ndarray, near: np.ndarray, matches: np.ndarray, itm_only: bool) -> Ranked:
    """The candidates `columns`, sorted by match logit plus similarity `near`; arrays are `[R, k]`.

    With `itm_only` they are sorted by the logit alone. Of equal scores the nearer comes first.
    """
    scores = matches if itm_only else matches + near
    order = np.argsort(-scores, axis=1, kind="stable")
    return Ranked(*(np.take_along_axis(each, order, axis=1) for each in (columns, scores)))


def spread(ranked: Ranked, count: int) -> np.ndarray:
    """Scores `[R, count]` of all `count` texts or images, `ABSENT` where one was not re-ranked."""
    scores = np.full((len(ranked.columns), count), ABSENT, np.float32)
    np.put_along_axis(scores, ranked.columns, ranked.scores, axis=1)
    return scores
