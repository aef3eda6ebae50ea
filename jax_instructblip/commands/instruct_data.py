"""Lets a language model write instruction data about captioned images, as LLaVA's was made.

instruct-data captions.jsonl --out data.json --model gpt-4o

The file has one image a line: {"id", "image", "captions": [texts], "instances": [{"category":
"cup", "bbox": [x1, y1, x2, y2]}]}, boxes from 0 to 1 and optional. The model is asked for a
conversation (it reads the captions alone), a detailed description and a question that takes
reasoning (captions and boxes). It never sees the image.

Replies are kept in a journal beside --out: the same command continues a run that was interrupted
or ran out of --max_tokens, and asks no answered request again. --out is written at the end, in
LLaVA's layout.
"""

import argparse
from pathlib import Path

from jax_instructblip.commands.flags import (
    add_endpoint,
    check_flags,
    print_requests,
    read_endpoint,
)
from jax_instructblip.data.instruct_data.kinds import KINDS
from jax_instructblip.lookup import find


def main(argv: list[str]) -> int:
    """Asks for the data and writes it; returns 0."""
    flags = _parser().parse_args(argv)
    check_flags(flags, stores=("contexts", "prompts"))
    settings = read_endpoint(flags)
    kinds = flags.kinds.split(",")
    for kind in kinds:
        find(KINDS, kind, "kind of request")
    from jax_instructblip.data.contexts import read_contexts
    from jax_instructblip.data.instruct_data.generate import describe, generate, make_requests
    from jax_instructblip.data.instruct_data.prompts import SHIPPED, read_prompts

    contexts = read_contexts(flags.contexts)
    prompts = read_prompts(flags.prompts or SHIPPED, kinds)
    if flags.dry_run:
        requests = [request for request, _, _ in make_requests(contexts, prompts)]
        print_requests(requests, settings)
        return 0
    limits = {"seed": flags.seed, "max_missing": flags.max_missing}
    for line in describe(generate(contexts, prompts, settings, flags.out, **limits)):
        print(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip instruct-data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("contexts", type=Path, help="JSON lines: images with captions and boxes")
    add("--out", type=Path, required=True, help="JSON file of conversations; must not exist")
    add("--kinds", default=",".join(KINDS), help="separated by commas (default: %(default)s)")
    add("--prompts", type=Path, help="folder of system messages and examples (default: shipped)")
    add("--seed", type=int, default=0, help="draws the questions of descriptions (default: 0)")
    add(
        "--max_missing",
        type=float,
        default=0.05,
        help="part of the requests that may stay without a usable answer (default: %(default)s)",
    )
    add_endpoint(parser, temperature=1.0)
    return parser
