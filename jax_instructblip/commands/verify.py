"""Asks a released model questions with published answers, and compares its answers with them.

    jax-instructblip verify --checkpoint FOLDER --image confusing-pictures=Confusing-Pictures.jpg

Without --image it lists the images that are needed and where to get them. The exit code is 0 if at
least one question was asked and all were answered as published.
"""

import argparse
from pathlib import Path

from jax_instructblip.commands.flags import add_dtype, add_template, check_flags
from jax_instructblip.evaluation.published import FACTS


def main(argv: list[str]) -> int:
    """Prints one line per question and a summary; returns 0 if all asked ones match, else 1."""
    flags = _parser().parse_args(argv)
    check_flags(flags, stores=("checkpoint", "image"))
    from jax_instructblip.evaluation.verification import verify

    outcome = verify(
        *(flags.checkpoint, flags.image),
        facts=flags.facts,
        model=flags.model,
        dtype=flags.dtype,
        template=flags.template,
    )
    return int(not outcome.agrees)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a Hugging Face folder, a converted one, or a run")
    add("--image", nargs="+", action="extend", default=[], metavar="NAME=FILE", help="one or more")
    add("--facts", type=Path, default=FACTS, help="a file of other published answers")
    add("--model", help="which of the models in the facts it is (default: by its sizes)")
    add_template(parser)
    add_dtype(parser)
    return parser
