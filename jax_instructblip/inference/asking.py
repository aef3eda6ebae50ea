"""Questions about image files, put to a checkpoint; inputs are checked before weights are read."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jax_instructblip.data.images import check_images
from jax_instructblip.inference.batching import Picture, Question, images_by_place, pair_inputs
from jax_instructblip.inference.generation_config import BATCH_SIZE, GenerationConfig
from jax_instructblip.inference.loading import read_source
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

    The keys are image (or images, where a prompt has several), prompt, answer, logprob, tokens,
    logprobs and alternatives. Images are given to prompts by `pair_inputs`, to those of a chat with
    several `<image>` by `images_by_place`. Other arguments and errors are those of `load_pipeline`
    and `InstructBlipPipeline.generate`.
    """
    pictures, questions = _check(checkpoint, template, images, prompts)
    blip = load(checkpoint, dtype=dtype, template=template, quantise=quantise)
    answers = blip.generate(pictures, prompts, config, batch_size=batch_size)
    return [
        {
            **_named_images(question),
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
) -> Iterator[tuple[list[str], str, Iterator[str]]]:
    """Yields (images, prompt, pieces of the answer) for each question, one after the other.

    Images are given to prompts as in `answer_files`, whose other arguments are the same. The pieces
    are texts that come while the answer is generated; joined they are the answer.
    """
    _, questions = _check(checkpoint, template, images, prompts)
    blip = load(checkpoint, dtype=dtype, template=template, quantise=quantise)
    for question in questions:
        files, prompt = list(map(str, question.frames)), str(question.prompt)
        yield files, prompt, blip.stream(files, prompt, config)


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

    `candidates` are common to all questions. The keys are image (or images), prompt and candidates:
    the `top` best, best first, each with candidate, score and probability. Images are given to
    prompts as in `answer_files`. Other arguments and errors are those of `load_pipeline` and
    `InstructBlipPipeline.rank`.
    """
    pictures, questions = _check(checkpoint, template, images, prompts, candidates)
    blip = load(checkpoint, dtype=dtype, template=template, quantise=quantise)
    scores = blip.rank(
        pictures, prompts, candidates, length_normalise=length_normalise, batch_size=batch_size
    )
    return [
        {
            **_named_images(question),
            "prompt": question.prompt,
            "candidates": best_candidates(candidates, row, top),
        }
        for question, row in zip(questions, scores, strict=True)
    ]


def best_candidates(candidates: Sequence[str], scores: np.ndarray, count: int) -> list[Row]:
    """The `count` best candidates, best first, as dicts with candidate, score and probability.

    `scores` `[C]` has a score for each candidate. The probabilities are a softmax over all of them.
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


def _named_images(question: Question) -> Row:
    """Returns the images of a question as a JSON line has them: `image`, or `images` if several."""
    images = list(question.frames)
    return {"image": images[0]} if len(images) == 1 else {"images": images}


def _check(
    checkpoint: str | os.PathLike,
    template: str | None,
    images: Sequence[str],
    prompts: Sequence[str],
    candidates: Sequence[str] | None = None,
) -> tuple[Sequence[Picture], list[Question]]:
    """Checks questions, candidates, checkpoint and image files; returns images and questions.

    This is done first, so that a mistake shows before weights are read or a question is answered.
    """
    if candidates is not None:
        check_candidates(candidates, max(len(images), len(prompts)))
    chat = bool(read_source(checkpoint).input_format.with_template(template).template)
    pictures = images_by_place(images, prompts) if chat else images
    questions = pair_inputs(pictures, prompts, chat=chat)
    check_images(images)
    return pictures, questions
