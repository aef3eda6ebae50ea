"""Training examples in view: their tokens, those that the loss asks for, and their numbers."""

import collections
import itertools
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from jax_instructblip.data.batch import IGNORE
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.models.variants import T5Config

_BAR = 40  # characters of the longest bar
Pieces = list[tuple[str, bool]]


def token_counts(example: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The numbers of tokens that Q-Former and language model read and that the loss asks for."""
    instruction = {}
    if "qformer_tokens" in example:
        instruction["instruction for the Q-Former"] = len(example["qformer_tokens"])
    return {
        **instruction,
        "tokens of the language model": len(example["tokens"]),
        "answer": int((example["targets"] != IGNORE).sum()),
    }


def histogram(name: str, counts: Sequence[int]) -> list[str]:
    """Lines of text: how many samples have up to 8, 16, 32 ... tokens."""
    lines = [f"{name}: {min(counts)} to {max(counts)} tokens, median {statistics.median(counts):g}"]
    # 1..8 -> 8, 9..16 -> 16: the padded lengths that a bucket would have.
    bins = collections.Counter(max(8, 1 << (count - 1).bit_length()) for count in counts)
    top = min(bins)
    while top <= max(bins):
        low = 1 if top == 8 else top // 2 + 1
        bar = "#" * -(-_BAR * bins[top] // max(bins.values()))
        lines.append(f"  {f'{low}-{top}':>9} {bins[top]:>8} {bar}".rstrip())
        top *= 2
    return lines


def token_rows(example: Mapping[str, np.ndarray], text: TextProcessor) -> dict[str, Pieces]:
    """The token rows of an example: pieces, each with whether the loss asks for it."""
    pieces = text.llm.convert_ids_to_tokens(example["tokens"].tolist())
    rows = {}
    if "qformer_tokens" in example:
        instruction = text.qformer.convert_ids_to_tokens(example["qformer_tokens"].tolist())
        rows["Q-Former reads"] = [(piece, False) for piece in instruction]
    if isinstance(text.variant.llm, T5Config):
        answer = text.llm.convert_ids_to_tokens(example["targets"].tolist())
        rows["encoder reads"] = [(piece, False) for piece in pieces]
        rows["decoder writes"] = [(piece, True) for piece in answer]
    else:
        learned = (example["targets"] != IGNORE).tolist()
        rows["LLM reads"] = list(zip(pieces, learned, strict=True))
    return rows


def render(pieces: Pieces) -> str:
    """The pieces on one line, brackets around every run of them that the loss asks for."""
    runs = []
    for asked, run in itertools.groupby(pieces, key=lambda pair: pair[1]):
        words = " ".join(piece for piece, _ in run)
        runs.append(f"[{words}]" if asked else words)
    return " ".join(runs)
