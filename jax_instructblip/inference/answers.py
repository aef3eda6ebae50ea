"""An answer, made of what decoding returns."""

import dataclasses
from typing import Any

import numpy as np

from jax_instructblip.data.text import TextProcessor


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
      text: the words, without special tokens and outer white space.
      tokens: the new ids alone; the last one is eos unless `max_new_tokens` cut the answer off.
      logprob: the sum over `tokens` (eos included) of their natural log-probabilities under the
        model itself, before temperature, truncation and penalties.
      logprobs: of each token.
      alternatives: of a beam search with `num_return_sequences` > 1, the next best answers.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    logprobs: tuple[float, ...] = ()
    alternatives: tuple["Answer", ...] = ()


def best_answer(
    text: TextProcessor, generated: dict[str, np.ndarray], row: int, count: int
) -> Answer:
    """The first of the row's answers, with the next `count - 1` as its alternatives.

    `generated` is what `generate_tokens` or `beam_tokens` returned.
    """
    first, *others = [_answer(text, generated, row, index) for index in range(count)]
    return dataclasses.replace(first, alternatives=tuple(others))


def _answer(text: TextProcessor, generated: dict[str, np.ndarray], row: int, index: int) -> Answer:
    length = generated["lengths"][row, index]
    tokens = generated["tokens"][row, index, :length].tolist()
    logprobs = generated["logprobs"][row, index, :length]
    logprob = float(logprobs.sum(dtype=np.float64))
    return Answer(text.decode(tokens), tuple(tokens), logprob, tuple(logprobs.tolist()))


def check_finite(wrong: list[int], dtype: Any) -> None:
    """Raises a ValueError where `wrong` names questions whose scores are not finite."""
    if wrong:
        raise ValueError(
            f"the model's scores of questions {wrong} are not finite, so what it says means "
            f"nothing: its weights are damaged, or overflow in {dtype} (float16 does first)"
        )
