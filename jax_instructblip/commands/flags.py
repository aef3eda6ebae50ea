"""Flags that several verbs (subcommands) share, and the check of all flag values.

This module is no verb: it has no `main`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from jax_instructblip.conversion.safetensors import SHARD_SIZE
from jax_instructblip.data.chat_templates import CHAT_TEMPLATES
from jax_instructblip.endpoint import settings as endpoint
from jax_instructblip.endpoint.asking import preview
from jax_instructblip.endpoint.journal import Request
from jax_instructblip.evaluation import settings
from jax_instructblip.fields import MOST_SECONDS, Field, find_problems, number, text_problem, whole
from jax_instructblip.files import find_addresses
from jax_instructblip.models.variants import DTYPES, QUANTISED

# Allowed values by flag name: a flag means the same in every verb.
NUMBERS: dict[str, Field] = {
    **settings.NUMBERS,
    **endpoint.NUMBERS,
    "frames": whole(1, 1_024, unit="of a video"),
    "layers": whole(1, 2, unit="of a projector"),
    "max_missing": number(0, 1, unit="part of the records"),
    "process": whole(0, special=(-1,)),
    "processes": whole(0, 1_000_000),
    "samples": whole(0, 10_000),
    "scale": number(above=0, at_most=1_000),
    "seed": whole(0, 2**32 - 1),  # JAX uses 32 bits of it: a larger one would wrap around
    "shard_bytes": SHARD_SIZE,
    "shard_size": whole(1, unit="records"),
    "silence_limit": number(above=0, at_most=MOST_SECONDS, unit="seconds"),
    "top": whole(1),
    "tries": whole(1, 1_000, optional=True, unit="plans"),
    "wait_limit": number(above=0, at_most=MOST_SECONDS, unit="seconds"),
    "word_std": number(above=0, at_most=10, optional=True),
    "workers": whole(0, 1_024, unit="processes"),
}
TEXTS = ("prompt",)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds `--checkpoint`, which is required."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a Hugging Face folder, a converted one, a run, or an embedded name (shapes_t5)",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype` to the parser."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights and computing (default: bfloat16, on a CPU float32)",
    )


def add_quantise(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds `--quantise` to the parser."""
    parser.add_argument(
        "--quantise",
        choices=QUANTISED,
        help="form of the weights of vision tower and language model (default: not quantised)",
    )


def add_template(parser: Any) -> None:
    """Adds `--template` to the parser or group."""
    parser.add_argument(
        "--template",
        choices=tuple(CHAT_TEMPLATES),
        help="chat template to ask the model by (default: its own; LLaVA has one)",
    )


def add_step(parser: argparse.ArgumentParser) -> None:
    """Adds `--step N` and `--best`, which exclude each other, to the parser."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--step", type=int, help="of a run: this checkpoint (default: the newest)")
    group.add_argument(
        "--best",
        action="store_true",
        help="of a run: the checkpoint of the highest validation/score",
    )


def add_endpoint(
    parser: argparse.ArgumentParser, temperature: float, *, required: bool = True
) -> None:
    """Adds the flags of `EndpointSettings` and `--dry_run`.

    `temperature` is the default of its flag; `required` tells whether `--model` must be given.
    """
    of = endpoint.EndpointSettings
    group = parser.add_argument_group(
        "the endpoint",
        f"Any OpenAI-compatible one; the environment variable {endpoint.KEY} holds its key.",
    )
    add = group.add_argument
    add("--model", required=required, help="name of the model at the endpoint")
    add("--endpoint", default="", metavar="URL", help="such as http://localhost:8000/v1 (OpenAI's)")
    add("--temperature", type=float, default=temperature, help="of sampling (%(default)s)")
    add(
        "--answer_tokens",
        type=int,
        default=of.answer_tokens,
        help="most in an answer (%(default)s)",
    )
    add("--max_tokens", type=int, default=of.max_tokens, help="most of the whole run (0: no limit)")
    add("--concurrency", type=int, default=of.concurrency, help="requests at once (%(default)s)")
    add("--timeout", type=float, default=of.timeout, help="seconds for an answer (%(default)s)")
    add(
        "--attempts",
        type=int,
        default=of.attempts,
        help="answers to one request before it is given up (%(default)s)",
    )
    add(
        "--retries",
        type=int,
        default=of.retries,
        help="failures in a row of one request that do not end the run (%(default)s)",
    )
    add(
        "--backoff",
        type=float,
        default=of.backoff,
        help="seconds to wait after a failure; doubled after each further one (%(default)s)",
    )
    add("--dry_run", action="store_true", help="print the requests as JSON lines; send nothing")


def read_endpoint(flags: argparse.Namespace) -> endpoint.EndpointSettings:
    """Returns the settings that the flags of `add_endpoint` give."""
    names = [field.name for field in dataclasses.fields(endpoint.EndpointSettings)]
    return endpoint.EndpointSettings(**{name: getattr(flags, name) for name in names})


def print_requests(requests: Sequence[Request], settings: endpoint.EndpointSettings) -> None:
    """Prints requests to stdout, an estimate of their tokens to stderr."""
    lines, summary = preview(requests, settings)
    for line in lines:
        print(line)
    print(summary, file=sys.stderr)


def without_accelerator() -> None:
    """Restricts JAX to the CPU, so that verbs that only convert files occupy no accelerator."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def check_flags(flags: argparse.Namespace, stores: Sequence[str] = ()) -> None:
    """Raises a ValueError that names every flag with an unusable value.

    `stores` names the flags whose values may be object-store addresses (`gs://bucket/run`).
    """
    values = vars(flags)
    problems = [*find_problems(values, NUMBERS, "--"), *find_addresses(values, stores)]
    for name in TEXTS:
        value = values.get(name) or []
        for each in value if isinstance(value, list) else [value]:
            if problem := text_problem(each):
                problems.append(f"--{name} {problem}")
    if problems:
        raise ValueError("; ".join(problems))
