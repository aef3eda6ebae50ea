"""The comparison of a model's answers with those that were published of it."""

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_instructblip.data.images import decode
from jax_instructblip.evaluation.published import (
    FACTS,
    Entry,
    Image,
    Published,
    is_published_file,
    read_facts,
)
from jax_instructblip.inference.loading import read_source
from jax_instructblip.inference.pipeline import Answer, InstructBlipPipeline
from jax_instructblip.inference.pipeline import load_pipeline as load
from jax_instructblip.models.released import released_name

AROUND = 20  # characters shown of each side of a difference

Say = Callable[[str], None]
SAY: Say = functools.partial(print, flush=True)


class Outcome(NamedTuple):
    """The numbers of published answers that were given, that were asked for, and that were not."""

    matching: int
    asked: int
    missing: int

    @property
    def agrees(self) -> bool:
        """Tells whether all that were asked match, and at least one was asked."""
        return 0 < self.asked == self.matching


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first place where an answer is not the published one.

    Attributes:
      place: "token 3" or "character 17", from 0.
      expected: what stands there in the published answer, with its surroundings.
      found: what stands there instead.
      by: whose answer it was compared with: of several the one that agrees longest.
    """

    place: str
    expected: str
    found: str
    by: str


def verify(
    checkpoint: str | os.PathLike,
    images: Sequence[str] = (),
    *,
    facts: str | os.PathLike = FACTS,
    model: str | None = None,
    dtype: Any = None,
    say: Say = SAY,
) -> Outcome:
    """Asks a checkpoint all published questions about the `images` that are given.

    Args:
      checkpoint: what `load` takes.
      images: `NAME=FILE`, the names those of the facts.
      facts: a file as `published.py` draws it.
      model: which of the models in the facts it is; by default that of its sizes.
      dtype: of weights and computing, as `load` takes it.
      say: takes each line about what is going on, as soon as it is known.

    Raises:
      ValueError: facts or images cannot be used, or there are no facts about such a model.
    """
    pictures, entries = read_facts(facts)
    paths = read_images(images, pictures)
    source = read_source(checkpoint)
    model = model or released_name(source.variant)
    mine = [entry for entry in entries if entry.model in ("", model)]
    if not mine:
        known = ", ".join(dict.fromkeys(entry.model for entry in entries))
        raise ValueError(
            f"{facts} has nothing about {model or 'a model of these sizes'}; "
            f"it knows {known}: name one of them by --model if the checkpoint is one"
        )
    asked = [entry for entry in mine if entry.image in paths]
    for name in {entry.image for entry in asked}:
        if not is_published_file(pictures[name], paths[name]):
            say(f"note: {paths[name]} is not the file that was published as {name}")
    matching = _ask(load(checkpoint, dtype=dtype), asked, paths, say) if asked else 0
    missing = [entry for entry in mine if entry.image not in paths]
    for line in _not_run(missing, pictures):
        say(line)
    say(
        f"{matching} of {len(asked)} asked match, {len(asked) - matching} differ, "
        f"{len(missing)} not run"
    )
    return Outcome(matching, len(asked), len(missing))


def read_images(words: Sequence[str], images: Mapping[str, Image]) -> dict[str, Path]:
    """The files of `NAME=FILE`, each opened once: a bad one should not wait for the weights."""
    paths = {}
    for word in words:
        name, _, path = word.partition("=")
        if not path:
            raise ValueError(f"--image {word}: expected NAME=FILE, NAME of {', '.join(images)}")
        if name not in images:
            near = difflib.get_close_matches(name, images, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(images)}"
            raise ValueError(f"--image {word}: there is no image {name!r}; {hint}")
        decode(path)
        paths[name] = Path(path)
    return paths


def _ask(
    blip: InstructBlipPipeline, entries: Sequence[Entry], paths: Mapping[str, Path], say: Say
) -> int:
    """The number of entries that match; each is told as soon as it is known."""
    matching = 0
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        answer, difference = compare(blip, entry, paths[entry.image])
        matching += difference is None
        verdict = "match" if difference is None else f"differs at {difference.place}"
        note = f"  (published {entry.note})" if entry.note else ""
        say(f"{entry.name:{width}}  {verdict}{note}")
        if difference is not None:
            say(f"    expected  {difference.expected}  by {difference.by}, {entry.source}")
            say(f"    found     {difference.found}")
            say(f"    answer    {answer.text!r}")
    return matching


def _not_run(entries: Sequence[Entry], images: Mapping[str, Image]) -> Iterator[str]:
    for name in dict.fromkeys(entry.image for entry in entries):
        yield f"not run without --image {name}=FILE ({images[name].description}):"
        yield f"    from {images[name].url}"
        yield from (f"    {entry.name}" for entry in entries if entry.image == name)


def compare(
    blip: InstructBlipPipeline, entry: Entry, image: str | os.PathLike
) -> tuple[Answer, Difference | None]:
    """The model's answer, and where it first differs from all published ones."""
    (answer,) = blip.generate([image], [entry.prompt], **entry.settings)
    compared = [first_difference(blip, answer, each) for each in entry.published]
    if None in compared:
        return answer, None
    differences = [pair for pair in compared if pair is not None]
    return answer, max(differences, key=lambda pair: pair[0])[1]


def first_difference(
    blip: InstructBlipPipeline, answer: Answer, published: Published
) -> tuple[float, Difference] | None:
    """The share of the published answer that was given, and what then differs.

    Tokens are compared where they were published, otherwise texts.
    """
    if published.tokens:
        unit, length = "token", len(published.tokens)
        position = _first_unequal(published.tokens, answer.tokens)
        expected = _token(blip, published.tokens, position)
        found = _token(blip, answer.tokens, position)
    else:
        unit, length = "character", len(published.text)
        position = _first_unequal(published.text, answer.text)
        expected, found = _around(published.text, position), _around(answer.text, position)
    if position < 0:
        return None
    return position / max(length, 1), Difference(
        f"{unit} {position}", expected, found, published.by
    )


def _first_unequal(expected: Sequence, found: Sequence) -> int:
    """The first place where the two differ, or where the shorter one ends; -1 if nowhere."""
    pairs = zip(expected, found, strict=False)
    for position, (one, other) in enumerate(pairs):
        if one != other:
            return position
    return -1 if len(expected) == len(found) else min(len(expected), len(found))


def _token(blip: InstructBlipPipeline, tokens: Sequence[int], position: int) -> str:
    if position >= len(tokens):
        return "the end"
    return f"{tokens[position]} {blip.text.decode(tokens[position : position + 1])!r}"


def _around(text: str, position: int) -> str:
    return (
        repr(text[max(0, position - AROUND) : position + AROUND])
        if position < len(text)
        else "the end"
    )
