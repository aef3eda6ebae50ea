"""Compares a model's answers with published answers of the same released model."""

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

AROUND = 20  # characters of context on each side of a difference

Say = Callable[[str], None]
SAY: Say = functools.partial(print, flush=True)


class Outcome(NamedTuple):
    """Counts of published questions.

    Attributes:
      matching: asked, and answered as published.
      asked: all that were asked.
      missing: not asked, because their image was not given.
    """

    matching: int
    asked: int
    missing: int

    @property
    def agrees(self) -> bool:
        """True if at least one question was asked and all answers match."""
        return 0 < self.asked == self.matching


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first position at which an answer differs from the published one.

    Attributes:
      place: "token 3" or "character 17", counted from 0.
      expected: the published answer at this position, with some context.
      found: the model's answer at this position.
      by: who published the answer; of several, the one that agrees longest.
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
    template: str | None = None,
    say: Say = SAY,
) -> Outcome:
    """Asks a checkpoint all published questions about the given images; returns the counts.

    Args:
      checkpoint: a checkpoint as `load` accepts it.
      images: `NAME=FILE` for each image; NAME is an image of `facts`.
      facts: a JSON file of published answers, in the format of `published.py`.
      model: the released model's name; by default determined by the checkpoint's sizes.
      dtype: of weights and computation, or its name; by default bfloat16, on a CPU float32.
      template: the chat template to ask the model by, a key of `CHAT_TEMPLATES`; by default its
        own.
      say: prints each line of the result as soon as it is known.

    Raises:
      ValueError: unusable facts or images, or no facts about this model.
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
    settings: dict[str, Any] = {"dtype": dtype, "template": template}
    matching = _ask(load(checkpoint, **settings), asked, paths, say) if asked else 0
    missing = [entry for entry in mine if entry.image not in paths]
    for line in _not_run(missing, pictures):
        say(line)
    say(
        f"{matching} of {len(asked)} asked match, {len(asked) - matching} differ, "
        f"{len(missing)} not run"
    )
    return Outcome(matching, len(asked), len(missing))


def read_images(words: Sequence[str], images: Mapping[str, Image]) -> dict[str, Path]:
    """Parses `NAME=FILE` words; returns the files by name, each opened once as a check.

    NAME is a key of `images`, the images that have facts.

    Raises:
      ValueError: a word is malformed, has an unknown NAME, or its file is no image.
    """
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
    """Asks the entries and prints the result of each; returns the number that match."""
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
    """Returns the model's answer, and its first difference from the published ones, or None.

    None means that it equals one of them. Otherwise the difference is from the published answer
    that agrees longest.
    """
    (answer,) = blip.generate([image], [entry.prompt], **entry.settings)
    compared = [first_difference(blip, answer, each) for each in entry.published]
    if None in compared:
        return answer, None
    differences = [pair for pair in compared if pair is not None]
    return answer, max(differences, key=lambda pair: pair[0])[1]


def first_difference(
    blip: InstructBlipPipeline, answer: Answer, published: Published
) -> tuple[float, Difference] | None:
    """Returns the share of the published answer before the first difference, and the difference.

    None if there is no difference. Compares tokens if they were published, else texts.
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
    """Returns the first index at which the sequences differ or one ends; -1 if equal."""
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
