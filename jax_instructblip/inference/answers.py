"""Answers: text, tokens and log-probabilities, made of what decoding returns."""

import dataclasses
from typing import Any

import numpy as np

from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.text import TextProcessor

Text = TextProcessor | CaptionTokenizer  # what decodes the ids


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
      text: the words up to the end, without special tokens and outer white space.
      tokens: the new ids alone; the last one is eos unless `max_new_tokens` cut the answer off. A
        chat template may end an answer with another token, or with the tokens of a text (`###`).
      logprob: the sum of `logprobs`.
      logprobs: the natural log-probability of each of `tokens` (eos included) under the model
        itself, before temperature, top-k, top-p and penalties.
      alternatives: the next best answers, of a beam search with `num_return_sequences` > 1.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    logprobs: tuple[float, ...] = ()
    alternatives: tuple["Answer", ...] = ()


def best_answer(text: Text, generated: dict[str, np.ndarray], row: int, count: int) -> Answer:
    """The best answer to question `row` of a batch, with the next `count - 1` ones as alternatives.

    `generated` is the result of `generate_tokens` or `beam_tokens`, as numpy arrays.
    """
    first, *others = [_answer(text, generated, row, index) for index in range(count)]
    return dataclasses.replace(first, alternatives=tuple(others))


def _answer(text: Text, generated: dict[str, np.ndarray], row: int, index: int) -> Answer:
    length = generated["lengths"][row, index]
    tokens = generated["tokens"][row, index, :length].tolist()
    logprobs = generated["logprobs"][row, index, :length]
    logprob = float(logprobs.sum(dtype=np.float64))
    return Answer(text.decode(tokens), tuple(tokens), logprob, tuple(logprobs.tolist()))


def check_finite(wrong: list[int], dtype: Any) -> None:
    """Raises a ValueError if `wrong`, the indices of questions with non-finite scores, has any.

    The message names `dtype`, in which the model computes.
    """
    if wrong:
        raise ValueError(
            f"the model's scores of questions {wrong} are not finite, so what it says means "
            f"nothing: its weights are damaged, or overflow in {dtype} (float16 does first)"
        )
