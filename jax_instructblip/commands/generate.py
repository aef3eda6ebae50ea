"""Answers questions about images.

Give one prompt for many images, one image for many prompts, or equally many of both. A model with a
chat template (LLaVA) takes several images in one prompt, one for each <image> in it:
--image a.jpg b.jpg --prompt "Is <image> like <image>?". Decoding is greedy by default. --num_beams
above 1 uses beam search; --do_sample, or any of --temperature, --top_k and --top_p, samples with
--seed.

With --jsonl the questions are lines of a file, such as

    {"image": "1.jpg", "prompt": "What is it?", "max_new_tokens": 8, "temperature": 0.7, "seed": 3}

with `id` (default NAME:LINE), `image` or `images`, `prompt`, and optional settings of decoding,
which go before the flags: max_new_tokens, min_new_tokens, do_sample, temperature, top_k, top_p,
seed, repetition_penalty. Each answer is a line of --out, with the question's id; one whose image
cannot be used has a `problem`. A run that was killed goes on where it stopped.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_instructblip.commands.flags import (
    add_checkpoint,
    add_dtype,
    add_quantise,
    add_template,
    check_flags,
)
from jax_instructblip.files import json_line
from jax_instructblip.inference.generation_config import (
    BATCH_SIZE,
    HELP,
    GenerationConfig,
    add_flags,
    read_flags,
)


def main(argv: list[str]) -> int:
    """Prints image, prompt, answer and log-probability of each question; returns 0.

    With `--jsonl`, writes the answers to a file instead.
    """
    parser = _parser()
    flags = parser.parse_args(argv)
    given = {"image": flags.image, "prompt": flags.prompt}
    if flags.jsonl is None and (lacking := [name for name in given if given[name] is None]):
        names = ", ".join(f"--{name}" for name in lacking)
        parser.error(f"the following arguments are required: {names}, or --jsonl")
    check_flags(flags, stores=("checkpoint", "image"))
    if flags.jsonl is not None:
        return _write(flags)
    if flags.out is not None:
        raise ValueError("--out: only used with --jsonl")
    if flags.stream and (flags.num_beams > 1 or flags.json or flags.batch_size != BATCH_SIZE):
        raise ValueError(
            "--stream shows each token as it is chosen: leave out --num_beams, which is certain of "
            "none before the end, --json, and --batch_size, for one question is answered at a time"
        )
    config = read_flags(flags)
    if flags.stream:
        return _stream(flags, config)
    from jax_instructblip.inference.asking import answer_files

    asked = (flags.checkpoint, flags.image, flags.prompt, config)
    how = {"dtype": flags.dtype, "template": flags.template, "quantise": flags.quantise}
    for row in answer_files(*asked, **how, batch_size=flags.batch_size):
        for line in [json_line(row)] if flags.json else _lines(row):
            print(line)
    return 0


def _write(flags: argparse.Namespace) -> int:
    """Answers the questions of a file and prints how many; returns 0."""
    names = ("image", "prompt", "stream", "json")
    if wrong := [f"--{name}" for name in names if getattr(flags, name)]:
        raise ValueError(f"{', '.join(wrong)}: not used with --jsonl, whose lines are questions")
    if flags.out is None:
        raise ValueError("--jsonl needs --out, the file of the answers")
    config = read_flags(flags)
    from jax_instructblip.evaluation.answer_file import answer_jsonl

    counts = answer_jsonl(
        *(flags.checkpoint, flags.jsonl, flags.out, config),
        dtype=flags.dtype,
        template=flags.template,
        quantise=flags.quantise,
        batch_size=flags.batch_size,
    )
    problems = f", {counts.problems} with a problem" if counts.problems else ""
    print(f"answers: {flags.out} ({counts.questions} questions{problems})")
    return 0


def _stream(flags: argparse.Namespace, config: GenerationConfig) -> int:
    """Prints each answer token by token, one question after the other; returns 0."""
    from jax_instructblip.inference.asking import stream_files

    asked = (flags.checkpoint, flags.image, flags.prompt, config)
    how = {"dtype": flags.dtype, "template": flags.template, "quantise": flags.quantise}
    for images, prompt, pieces in stream_files(*asked, **how):
        print(f"image:            {', '.join(images)}\nprompt:           {prompt}")
        print("answer:           ", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print("\n")
    return 0


def _lines(row: dict[str, Any]) -> Iterator[str]:
    yield f"image:            {', '.join(row.get('images') or [row['image']])}"
    yield f"prompt:           {row['prompt']}"
    yield f"answer:           {row['answer']}"
    yield f"log-probability:  {row['logprob']:.3f}  ({len(row['tokens'])} tokens)"
    for text in row["alternatives"]:
        yield f"or:               {text}"
    yield ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    add = parser.add_argument
    add("--image", nargs="+", action="extend", metavar="FILE", help="one or more")
    add("--prompt", action="append", help="the question; may be given again")
    add("--jsonl", type=Path, metavar="FILE", help="questions as JSON lines, see above")
    add("--out", type=Path, metavar="FILE", help="of --jsonl: the answers, a .jsonl file")
    names = (name for name in HELP if name != "length_rule")
    add_flags(parser, *names)
    add_template(parser)
    add_dtype(parser)
    add_quantise(parser)
    add("--batch_size", type=int, default=BATCH_SIZE, help="asked at once (default: %(default)s)")
    add("--stream", action="store_true", help="print each token as soon as it is chosen; no beams")
    add("--json", action="store_true", help="print one JSON object a line")
    return parser
