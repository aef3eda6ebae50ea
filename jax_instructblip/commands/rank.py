"""Ranks candidate answers to questions about images.

Candidates stand between commas, or one a line in a file: --candidates red,green or @answers.txt.
One prompt for many images, or one image for many prompts, or as many of the one as of the other.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jax_instructblip.commands.flags import check_flags
from jax_instructblip.commands.generate import check_images
from jax_instructblip.files import json_line, read_lines
from jax_instructblip.inference.batching import pair
from jax_instructblip.inference.loading import DTYPES, resolve_checkpoint
from jax_instructblip.inference.pipeline import BATCH_SIZE, load
from jax_instructblip.inference.ranking import check_candidates


def main(argv: list[str]) -> int:
    """Prints the best candidates of each question, their scores and probabilities; returns 0."""
    flags = _parser().parse_args(argv)
    check_flags(flags)
    # Mistakes here should not wait for the weights, nor bad images for the scores of good ones.
    questions = pair(flags.image, flags.prompt)
    candidates = _read(flags.candidates)
    check_candidates(candidates, len(questions))
    resolve_checkpoint(flags.checkpoint)
    check_images(flags.image)
    blip = load(flags.checkpoint, dtype=flags.dtype)
    scores = blip.rank(
        flags.image,
        flags.prompt,
        candidates,
        length_normalise=flags.length_normalise,
        batch_size=flags.batch_size,
    )
    for question, row in zip(questions, scores, strict=True):
        found = {
            "image": question.frames[0],
            "prompt": question.prompt,
            "candidates": _best(candidates, row, flags.top),
        }
        for line in [json_line(found)] if flags.json else _lines(found):
            print(line)
    return 0


def _read(given: str) -> list[str]:
    """The candidates of the flag; blank lines of a file are passed over."""
    if not given.startswith("@"):
        return [each.strip() for each in given.split(",")]
    return [line.strip() for line in read_lines(Path(given[1:])) if line.strip()]


def _best(candidates: list[str], scores: np.ndarray, count: int) -> list[dict[str, Any]]:
    """The best `count` candidates, best first; probabilities are a softmax over all of them."""
    chances = np.exp(scores.astype(np.float64) - scores.max())
    chances /= chances.sum()
    order = np.argsort(-scores, kind="stable")[:count]
    return [
        {
            "candidate": candidates[place],
            "score": float(scores[place]),
            "probability": float(chances[place]),
        }
        for place in order
    ]


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"image:   {found['image']}"
    yield f"prompt:  {found['prompt']}"
    yield "     score  probability  candidate"
    for each in found["candidates"]:
        yield f"{each['score']:10.3f}  {each['probability']:11.2%}  {each['candidate']}"
    yield ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip rank",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        help="a Hugging Face folder, a converted one, a run, or an embedded name (shapes_t5)",
    )
    add("--image", required=True, nargs="+", action="extend", metavar="FILE", help="one or more")
    add("--prompt", required=True, action="append", help="the question; may be given again")
    add("--candidates", required=True, metavar="A,B,C or @FILE", help="the same for all questions")
    add("--top", type=int, default=5, metavar="N", help="print the best N (default: %(default)s)")
    add(
        "--length_normalise",
        action="store_true",
        help="score by the mean of the tokens' log-probabilities; by default their sum",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="of weights and computing (default: bfloat16, on a CPU float32)",
    )
    add("--batch_size", type=int, default=BATCH_SIZE, help="ranked at once (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object a line")
    return parser
