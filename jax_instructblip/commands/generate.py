"""Answers questions about images.

One prompt for many images, or one image for many prompts, or as many of the one as of the other.
Decoding is greedy; any of --temperature, --top_k and --top_p draws instead, by --seed.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from jax_instructblip.data.images import ImageError, decode
from jax_instructblip.files import json_line, refuse_addresses
from jax_instructblip.inference.pipeline import BATCH_SIZE, InstructBlipPipeline, load
from jax_instructblip.inference.questions import Question, pair
from jax_instructblip.inference.source import resolve_checkpoint


def main(argv: list[str]) -> int:
    """Prints image, prompt, answer and log-probability of each question; returns 0."""
    flags = _parser().parse_args(argv)
    refuse_addresses(vars(flags))
    if flags.stream and (flags.num_beams > 1 or flags.json):
        raise ValueError(
            "--stream shows each token as it is chosen: leave out --num_beams, which is certain of "
            "none before the end, and --json"
        )
    # Mistakes here should not wait for the weights, nor bad images for the answers to good ones.
    questions = pair(flags.image, flags.prompt)
    resolve_checkpoint(flags.checkpoint)
    check_images(flags.image)
    blip = load(flags.checkpoint, dtype=flags.dtype)
    if flags.stream:
        return _stream(blip, questions, flags)
    answers = blip.generate(
        flags.image,
        flags.prompt,
        max_new_tokens=flags.max_new_tokens,
        min_new_tokens=flags.min_new_tokens,
        num_beams=flags.num_beams,
        repetition_penalty=flags.repetition_penalty,
        temperature=flags.temperature,
        top_p=flags.top_p,
        top_k=flags.top_k,
        seed=flags.seed,
        batch_size=flags.batch_size,
        length_penalty=flags.length_penalty,
        num_return_sequences=flags.num_return_sequences,
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


def _stream(
    blip: InstructBlipPipeline, questions: list[Question], flags: argparse.Namespace
) -> int:
    """Prints the answers while they are made, one question after the other; returns 0."""
    for question in questions:
        print(f"image:            {question.frames[0]}\nprompt:           {question.prompt}")
        print("answer:           ", end="", flush=True)
        for piece in blip.stream(
            question.frames[0],
            question.prompt,
            max_new_tokens=flags.max_new_tokens,
            min_new_tokens=flags.min_new_tokens,
            repetition_penalty=flags.repetition_penalty,
            temperature=flags.temperature,
            top_p=flags.top_p,
            top_k=flags.top_k,
            seed=flags.seed,
        ):
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
    add("--max_new_tokens", type=int, default=30, help="of an answer (default: %(default)s)")
    add("--min_new_tokens", type=int, default=0, help="no answer ends before (default: 0)")
    add("--num_beams", type=int, default=1, help="rows of a beam search (default: 1, greedy)")
    add("--length_penalty", type=float, default=1.0, help="of beams; below 0: shorter (default: 1)")
    add("--num_return_sequences", type=int, default=1, help="answers to show of a beam search")
    add("--temperature", type=float, help="above 0; draws instead of taking the best token")
    add("--top_k", type=int, help="draws among the k best tokens only")
    add("--top_p", type=float, help="draws among the best tokens that together reach p only")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: fewer repeats (default: 1)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of weights and computing (default: bfloat16, on a CPU float32)",
    )
    add("--batch_size", type=int, default=BATCH_SIZE, help="asked at once (default: %(default)s)")
    add("--stream", action="store_true", help="print each token as soon as it is chosen; no beams")
    add("--json", action="store_true", help="print one JSON object a line")
    return parser
