"""Lays out the rows of a batch: which samples share a row, and how wide the rows are.

Both follow from the lengths of all samples of the global batch, which every host computes from its
texts, so all hosts agree. Lengths of a sample are `slots` (tokens and visual vectors of the
language model), `targets`, `qformer_tokens` and `images`, by name.

Answers are short, but a batch nearly always has a long one: rows of one sample, all as wide as the
longest, are mostly padding. Rows of several samples are nearly equal in length.
"""

from collections.abc import Mapping, Sequence

import numpy as np

ROUND = 64  # rows of several samples have a multiple of this many slots, and of targets
TEXT_ROUND = 32  # and their instructions, which the Q-Former reads, a multiple of this many tokens

# What counts in dealing out: shares of all slots twice as much as shares of all targets, which take
# a decoder (T5) or only a head, but make rows as wide as the longest answers.
WEIGHTS = (1.0, 0.5)

Sizes = Sequence[Mapping[str, int]]  # of each sample, by name


def deal(sizes: Sequence[Sequence[int]], rows: int) -> np.ndarray:
    """Returns the sample numbers of each row, [rows, samples / rows]; rows get similar lengths.

    `sizes` has for each sample how much room it takes: its slots, or slots and targets (`WEIGHTS`).
    The largest sample comes first; each goes to the emptiest row that does not have all its samples
    yet. With one sample a row the order is kept. The result depends on `sizes` alone, so that all
    hosts compute the same.

    Raises:
        ValueError: the number of samples is not divisible by `rows`.
    """
    if len(sizes) % rows:
        raise ValueError(
            f"{len(sizes)} samples cannot be dealt out evenly to {rows} rows: expected a multiple "
            f"of {rows}"
        )
    room = len(sizes) // rows
    if room == 1:
        return np.arange(rows)[:, None]
    whole = [max(sum(each), 1) for each in zip(*sizes, strict=True)]
    weighed = list(zip(WEIGHTS, whole, strict=False))
    fullness = lambda size: sum(w * a / b for a, (w, b) in zip(size, weighed, strict=True))
    order = sorted(range(len(sizes)), key=lambda sample: (-fullness(sizes[sample]), sample))
    rows_of_samples: list[list[int]] = [[] for _ in range(rows)]
    fill = [[0] * len(whole) for _ in range(rows)]
    for sample in order:
        free = (row for row in range(rows) if len(rows_of_samples[row]) < room)
        row = min(free, key=lambda row: (fullness(fill[row]), row))
        rows_of_samples[row].append(sample)
        fill[row] = [a + b for a, b in zip(fill[row], sizes[sample], strict=True)]
    return np.array(rows_of_samples)


def row_lengths(sizes: Sizes, shared: np.ndarray, text_limit: int) -> dict[str, int]:
    """Returns the widths of rows of several samples, the argument `lengths` of `batch.collate`.

    `sizes` has the lengths of each sample by name (see the top of this file), `shared` the samples
    of each row, from `deal`; `text_limit` is the most tokens of an instruction that the Q-Former
    reads. Slots and targets are those of the widest row, and the instruction the longest one, all
    rounded up, so that a run compiles few programs.
    """
    widest = lambda name: max(sum(sizes[sample][name] for sample in row) for row in shared)
    text = max(size["qformer_tokens"] for size in sizes)
    return {
        "images": max(widest("images"), 1),  # a batch of texts alone has an unused image
        "qformer_tokens": min(round_up(text, TEXT_ROUND), max(text_limit, 1)),
        "slots": round_up(widest("slots")),
        "targets": round_up(widest("targets")),
    }


def round_up(length: int, multiple: int = ROUND) -> int:
    """Returns `length` rounded up to a positive multiple of `multiple`."""
    return max(-(-length // multiple), 1) * multiple
