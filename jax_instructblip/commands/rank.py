"""Ranks candidate answers to questions about images.

Candidates are separated by commas, or one per line in a file: --candidates red,green or
@answers.txt. Give one prompt for many images, one image for many prompts, or equally many of both;
of a model with a chat template (LLaVA) an image for each <image> of a prompt.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from jax_instructblip import stores
from jax_instructblip.commands.flags import (
    add_checkpoint,
    add_dtype,
    add_quantise,
    add_template,
    check_flags,
)
from jax_instructblip.files import json_line, read_entries
from jax_instructblip.inference.generation_config import BATCH_SIZE


def main(argv: list[str]) -> int:
    """Prints the best candidates of each question with scores and probabilities; returns 0."""
    flags = _parser().parse_args(argv)
    check_flags(flags, stores=("checkpoint", "image", "candidates"))
    candidates = _read(flags.candidates)
    from jax_instructblip.inference.asking import rank_files

    rows = rank_files(
        *(flags.checkpoint, flags.image, flags.prompt, candidates),
        top=flags.top,
        length_normalise=flags.length_normalise,
        dtype=flags.dtype,
        template=flags.template,
        quantise=flags.quantise,
        batch_size=flags.batch_size,
    )
    for row in rows:
        for line in [json_line(row)] if flags.json else _lines(row):
            print(line)
    return 0


def _read(words: str) -> list[str]:
    """Returns the candidates of the flag's value; blank lines of a file are skipped."""
    if words.startswith("@"):
        return read_entries(stores.input_path(words[1:]))
    return [each.strip() for each in words.split(",")]


def _lines(row: dict[str, Any]) -> Iterator[str]:
    yield f"image:   {', '.join(row.get('images') or [row['image']])}"
    yield f"prompt:  {row['prompt']}"
    yield "     score  probability  candidate"
    for each in row["candidates"]:
        yield f"{each['score']:10.3f}  {each['probability']:11.2%}  {each['candidate']}"
    yield ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip rank",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    add = parser.add_argument
    add("--image", required=True, nargs="+", action="extend", metavar="FILE", help="one or more")
    add("--prompt", required=True, action="append", help="the question; may be given again")
    add("--candidates", required=True, metavar="A,B,C or @FILE", help="the same for all questions")
    add("--top", type=int, default=5, metavar="N", help="print the best N (default: %(default)s)")
    add(
        "--length_normalise",
        action="store_true",
        help="score by the mean of the tokens' log-probabilities; by default their sum",
    )
    add_template(parser)
    add_dtype(parser)
    add_quantise(parser)
    add("--batch_size", type=int, default=BATCH_SIZE, help="ranked at once (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object a line")
    return parser
