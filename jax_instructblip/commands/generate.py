"""Answers questions about images.

One prompt for many images, or one image for many prompts, or as many of the one as of the other.
Decoding is greedy. --num_beams above 1 searches with as many beams; --do_sample, or any of
--temperature, --top_k and --top_p, draws by --seed.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from jax_instructblip.commands.flags import check_flags
from jax_instructblip.data.images import ImageError, decode
from jax_instructblip.files import json_line
from jax_instructblip.inference.batching import Question, pair
from jax_instructblip.inference.generation_config import (
    HELP,
    GenerationConfig,
    add_flags,
    read_flags,
)
from jax_instructblip.inference.loading import DTYPES, resolve_checkpoint
from jax_instructblip.inference.pipeline import BATCH_SIZE, InstructBlipPipeline, load


def main(argv: list[str]) -> int:
    """Prints image, prompt, answer and log-probability of each question; returns 0."""
    flags = _parser().parse_args(argv)
    check_flags(flags)
    if flags.stream and (flags.num_beams > 1 or flags.json):
        raise ValueError(
            "--stream shows each token as it is chosen: leave out --num_beams, which is certain of "
            "none before the end, and --json"
        )
    config = read_flags(flags)
    # Mistakes here should not wait for the weights, nor bad images for the answers to good ones.
    questions = pair(flags.image, flags.prompt)
    resolve_checkpoint(flags.checkpoint)
    check_images(flags.image)
    blip = load(flags.checkpoint, dtype=flags.dtype)
    if flags.stream:
        return _stream(blip, questions, config)
    answers = blip.generate(
        flags.image,
        flags.prompt,
        config,
        batch_size=flags.batch_size,
    )
    for question, answer in zip(questions, answers, strict=True):
        found = {
            "image": question.frames[0],
            "prompt": question.prompt,
            "answer": answer.text,
            "logprob": answer.logprob,
            "tokens": list(answer.tokens),
            "logprobs": list(answer.logprobs),
            "alternatives": [each.text for each in answer.alternatives],
        }
        for line in [json_line(found)] if flags.json else _lines(found):
            print(line)
    return 0


def _stream(blip: InstructBlipPipeline, questions: list[Question], config: GenerationConfig) -> int:
    """Prints the answers while they are made, one question after the other; returns 0."""
    for question in questions:
        print(f"image:            {question.frames[0]}\nprompt:           {question.prompt}")
        print("answer:           ", end="", flush=True)
        for piece in blip.stream(question.frames[0], question.prompt, config):
            print(piece, end="", flush=True)
        print("\n")
    return 0


def check_images(paths: list[str]) -> None:
    """Raises an ImageError that names every image that cannot be used."""
    wrong = []
    for path in paths:
        try:
            decode(path)
        except ImageError as error:
            wrong.append(str(error))
    if wrong:
        raise ImageError("; ".join(wrong))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"image:            {found['image']}"
    yield f"prompt:           {found['prompt']}"
    yield f"answer:           {found['answer']}"
    yield f"log-probability:  {found['logprob']:.3f}  ({len(found['tokens'])} tokens)"
    for text in found["alternatives"]:
        yield f"or:               {text}"
    yield ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip generate",
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
    names = (name for name in HELP if name != "length_rule")
    add_flags(parser, *names)
    add(
        "--dtype",
        choices=DTYPES,
        help="of weights and computing (default: bfloat16, on a CPU float32)",
    )
    add("--batch_size", type=int, default=BATCH_SIZE, help="asked at once (default: %(default)s)")
    add("--stream", action="store_true", help="print each token as soon as it is chosen; no beams")
    add("--json", action="store_true", help="print one JSON object a line")
    return parser
