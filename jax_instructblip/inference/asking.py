"""Questions about image files, put to a checkpoint; inputs are checked before weights are read."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jax_instructblip.data.images import check_images
from jax_instructblip.inference.batching import Question, pair_inputs
from jax_instructblip.inference.generation_config import BATCH_SIZE, GenerationConfig
from jax_instructblip.inference.loading import resolve_checkpoint
from jax_instructblip.inference.pipeline import load_pipeline as load
from jax_instructblip.inference.ranking import check_candidates

Row = dict[str, Any]


def answer_files(
    checkpoint: str | os.PathLike,
    images: Sequence[str],
    prompts: Sequence[str],
    config: GenerationConfig,
    *,
    dtype: Any = None,
    template: str | None = None,
    quantise: str | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[Row]:
    """Answers questions about image files; returns one dict per question, in order.

    The keys are image, prompt, answer, logprob, tokens, logprobs and alternatives. Arguments and
    errors are those of `load_pipeline` and `InstructBlipPipeline.generate`.
    """
    questions = _check(checkpoint, images, prompts)
    blip = load(checkpoint, dtype=dtype, template=template, quantise=quantise)
    answers = blip.generate(images, prompts, config, batch_size=batch_size)
    return [
        {
            "image": question.frames[0],
            "prompt": question.prompt,
            "answer": answer.text,
            "logprob": answer.logprob,
            "tokens": list(answer.tokens),
            "logprobs": list(answer.logprobs),
            "alternatives": [each.text for each in answer.alternatives],
        }
        for question, answer in zip(questions, answers, strict=True)
    ]


def stream_files(
    checkpoint: str | os.PathLike,
    images: Sequence[str],
    prompts: Sequence[str],
    config: GenerationConfig,
    *,
    dtype: Any = None,
    template: str | None = None,
    quantise: str | None = None,
) -> Iterator[tuple[Any, str, Iterator[str]]]:
    """Yields (image, prompt, pieces of the answer) for each question, one after the other."""
    questions = _check(checkpoint, images, prompts)
    blip = load(checkpoint, dtype=dtype, template=template, quantise=quantise)
    for question in questions:
        image, prompt = question.frames[0], str(question.prompt)
        yield image, prompt, blip.stream(image, prompt, config)


def rank_files(
    checkpoint: str | os.PathLike,
    images: Sequence[str],
    prompts: Sequence[str],
    candidates: Sequence[str],
    *,
    top: int,
    length_normalise: bool = False,
    dtype: Any = None,
    template: str | None = None,
    quantise: str | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[Row]:
    """Ranks candidate answers to questions about image files; returns one dict per question.

    The keys are image, prompt and candidates: the `top` best, each with candidate, score and
    probability. Arguments and errors are those of `load_pipeline` and `InstructBlipPipeline.rank`.
    """
    questions = _check(checkpoint, images, prompts, candidates)
    blip = load(checkpoint, dtype=dtype, template=template, quantise=quantise)
    scores = blip.rank(
        images, prompts, candidates, length_normalise=length_normalise, batch_size=batch_size
    )
    return [
        {
            "image": question.frames[0],
            "prompt": question.prompt,
            "candidates": best_candidates(candidates, row, top),
        }
        for question, row in zip(questions, scores, strict=True)
    ]


def best_candidates(candidates: Sequence[str], scores: np.ndarray, count: int) -> list[Row]:
    """The `count` best candidates, best first, as dicts with candidate, score and probability.

    The probabilities are a softmax over the scores of all candidates.
    """
    chances = np.exp(scores.astype(np.float64) - scores.max())
    chances /= chances.sum()
    order = np.argsort(-scores, kind="stable")[:count]
    return [
        {
            "candidate": candidates[index],
            "score": float(scores[index]),
            "probability": float(chances[index]),
        }
        for index in order
    ]


def _check(
    checkpoint: str | os.PathLike,
    images: Sequence[str],
    prompts: Sequence[str],
    candidates: Sequence[str] | None = None,
) -> list[Question]:
    """Checks questions, candidates, checkpoint path and image files, and returns the questions.

    This is done first, so that a mistake shows before weights are read or a question is answered.
    """
    questions = pair_inputs(images, prompts)
    if candidates is not None:
        check_candidates(candidates, len(questions))
    resolve_checkpoint(checkpoint)
    check_images(images)
    return questions
