"""Asks a language model for instruction data about described images, and writes LLaVA's JSON."""

import collections
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_instructblip import atomic
from jax_instructblip.data.contexts import Context
from jax_instructblip.data.conversation import USER
from jax_instructblip.data.instruct_data.prompts import Prompts
from jax_instructblip.data.instruct_data.rounds import find_problem, parse_rounds, turns
from jax_instructblip.endpoint.asking import ask
from jax_instructblip.endpoint.journal import Request
from jax_instructblip.endpoint.settings import EndpointSettings
from jax_instructblip.files import local_path


@dataclasses.dataclass(frozen=True)
class GeneratedFile:
    """A file of conversations that was written.

    Attributes:
      path: the file.
      counts: the number of conversations of each kind, a key of `KINDS`.
      missing: by the request's id, the reason why it has no usable answer.
      tokens: tokens of all requests and answers.
    """

    path: Path
    counts: Mapping[str, int]
    missing: Mapping[str, str]
    tokens: int


def make_requests(
    contexts: Sequence[Context], prompts: Mapping[str, Prompts]
) -> list[tuple[Request, Context, str]]:
    """Returns (request, context, kind) for each context and each kind in `prompts`.

    The ids of the requests are `CONTEXT/KIND`, with the context's id.
    """
    return [
        (Request(f"{context.id}/{kind}", each.messages(context)), context, kind)
        for context in contexts
        for kind, each in prompts.items()
    ]


def generate(
    contexts: Sequence[Context],
    prompts: Mapping[str, Prompts],
    settings: EndpointSettings,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    max_missing: float,
) -> GeneratedFile:
    """Writes one conversation for each context and kind to `out`, in LLaVA's JSON layout.

    `prompts` has the prompts of each kind (`read_prompts`). Replies are kept in a journal beside
    `out` (`journal_path`). A run that was interrupted is continued by the same call. `seed` draws
    the questions of descriptions. `out` is written when all requests are done, if the fraction of
    them without a usable answer is at most `max_missing`.

    Raises:
      FileExistsError: `out` exists.
      ValueError: too many answers are missing; or as `asking.ask`.
      OSError: as `asking.ask`, or `out` cannot be written.
    """
    out = local_path(out, "out")
    refuse_output(out)
    asked = make_requests(contexts, prompts)
    kinds = {request.id: kind for request, _, kind in asked}
    outcome = ask(
        [request for request, _, _ in asked],
        settings,
        journal_path(out),
        {"prompts": {kind: each.digest() for kind, each in prompts.items()}},
        lambda request, text: find_problem(kinds[request.id], text),
    )
    if len(outcome.missing) > max_missing * len(asked):
        shown = [f"{name}: {why}" for name, why in list(outcome.missing.items())[:10]]
        raise ValueError(
            "\n  ".join(
                [
                    f"{len(outcome.missing)} of {len(asked)} requests have no usable answer, at "
                    f"most {max_missing:g} of them may be missing (--max_missing); {out} was not "
                    "written. More --attempts may help. The first are:",
                    *shown,
                ]
            )
        )
    rows = [
        _row(context, kind, outcome.answers[request.id], seed)
        for request, context, kind in asked
        if request.id in outcome.answers
    ]
    refuse_output(out)
    atomic.write_file(out, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    counts = collections.Counter(kind for each, _, kind in asked if each.id in outcome.answers)
    return GeneratedFile(out, counts, outcome.missing, outcome.tokens)


def journal_path(out: Path) -> Path:
    """Returns the journal of an output: `data.journal.jsonl` of `data.json`."""
    return out.with_name(f"{out.stem}.journal.jsonl")


def refuse_output(out: Path) -> None:
    """Raises an OSError if `out` exists or cannot be written."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists and is not overwritten: remove it, or choose another")
    if problem := atomic.unwritable(out.parent):
        raise OSError(f"{out} cannot be written: {problem}; choose another --out")


def describe(written: GeneratedFile) -> Iterator[str]:
    """Yields lines of text for people about a file that was written."""
    counts = ", ".join(f"{kind} {count}" for kind, count in written.counts.items())
    total = sum(written.counts.values())
    yield f"written: {written.path}: {total} conversations ({counts}), {written.tokens:,} tokens"
    for name, reason in written.missing.items():
        yield f"without an answer: {name}: {reason}"


def _row(context: Context, kind: str, answer: str, seed: int) -> dict[str, Any]:
    rounds = parse_rounds(kind, answer, f"{seed}:{context.id}")
    said = [
        {"from": "human" if turn.speaker == USER else "gpt", "value": turn.text}
        for turn in turns(rounds)
    ]
    return {"id": context.id, "image": context.image, "conversations": said}
