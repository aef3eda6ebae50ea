"""Published answers of released weights, and whether a model gives the same.

The facts stand in a JSON file (`FACTS`; any other of its form will do):

    {"images": {NAME: {"description", "url", "sha256": of the file, where it is known}},
     "entries": [{"name", "model": a variant, or "" for any model, "image": NAME, "prompt",
                  "settings": of `generate`, "source",
                  "published": [{"by", "text", "tokens": new ids, eos included, if known}],
                  "note": optional}]}

Several published answers of one entry are all right: code or precision differed.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_instructblip.files import read_json
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import Answer, InstructBlipPipeline

FACTS = Path(__file__).with_name("published.json")
AROUND = 20  # characters shown of each side of a difference


@dataclasses.dataclass(frozen=True)
class Image:
    """An image: its description, its address, the sha256 of its file ("" where unknown)."""

    description: str
    url: str
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class Published:
    """An answer, who published it, and its new ids, () where they are not known."""

    by: str
    text: str
    tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """One question whose answer was published."""

    name: str
    model: str
    image: str
    prompt: str
    settings: Mapping[str, Any]
    published: tuple[Published, ...]
    source: str
    note: str = ""


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


def read_facts(path: str | os.PathLike) -> tuple[dict[str, Image], list[Entry]]:
    """Images by name, and entries.

    Raises:
      ValueError: the file is no such JSON; every wrong entry is named, with what was expected.
    """
    path = Path(path)
    try:
        document = read_json(path)
        images, rows = dict(document["images"]), list(document["entries"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no facts ({type(error).__name__}: {error}): expected an object with "
            '"images" and "entries"'
        ) from error
    problems: list[str] = []
    known = {name: _build(Image, row, f"image {name!r}", problems) for name, row in images.items()}
    entries = [_entry(row, number, images, problems) for number, row in enumerate(rows)]
    if problems:
        raise ValueError("\n  ".join([f"{path} has facts that cannot be used:", *problems]))
    if not entries:
        raise ValueError(f"{path} has no entries: there is nothing to compare with")
    return {name: image for name, image in known.items() if image}, [e for e in entries if e]


def compare(
    blip: InstructBlipPipeline, entry: Entry, image: str | os.PathLike
) -> tuple[Answer, Difference | None]:
    """The model's answer, and where it first differs from all published ones."""
    (answer,) = blip.generate([image], [entry.prompt], **entry.settings)
    found = [first_difference(blip, answer, each) for each in entry.published]
    if None in found:
        return answer, None
    differences = [pair for pair in found if pair is not None]
    return answer, max(differences, key=lambda pair: pair[0])[1]


def first_difference(
    blip: InstructBlipPipeline, answer: Answer, published: Published
) -> tuple[float, Difference] | None:
    """The share of the published answer that was given, and what then differs.

    Tokens are compared where they were published, otherwise texts.
    """
    if published.tokens:
        unit, length = "token", len(published.tokens)
        place = _first_unequal(published.tokens, answer.tokens)
        expected = _token(blip, published.tokens, place)
        found = _token(blip, answer.tokens, place)
    else:
        unit, length = "character", len(published.text)
        place = _first_unequal(published.text, answer.text)
        expected, found = _around(published.text, place), _around(answer.text, place)
    if place < 0:
        return None
    return place / max(length, 1), Difference(f"{unit} {place}", expected, found, published.by)


def is_published_file(image: Image, path: str | os.PathLike) -> bool:
    """Tells whether the file is the published one, to the byte; True where it is not known."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return not image.sha256 or digest == image.sha256


def _first_unequal(expected: Sequence, found: Sequence) -> int:
    """The first place where the two differ, or where the shorter one ends; -1 if nowhere."""
    pairs = zip(expected, found, strict=False)
    for place, (one, other) in enumerate(pairs):
        if one != other:
            return place
    return -1 if len(expected) == len(found) else min(len(expected), len(found))


def _token(blip: InstructBlipPipeline, tokens: Sequence[int], place: int) -> str:
    if place >= len(tokens):
        return "the end"
    return f"{tokens[place]} {blip.text.decode(tokens[place : place + 1])!r}"


def _around(text: str, place: int) -> str:
    return repr(text[max(0, place - AROUND) : place + AROUND]) if place < len(text) else "the end"


def _entry(row: Any, number: int, images: Mapping[str, Any], problems: list[str]) -> Entry | None:
    where = f"entry {number}"
    if not isinstance(row, dict):
        problems.append(f"{where} is no object")
        return None
    published = row.get("published")
    if not isinstance(published, list) or not published:
        problems.append(f"{where}: published holds no answers")
        published = []
    answers = [_build(Published, each, f"{where}: published", problems) for each in published]
    entry = _build(Entry, row | {"published": tuple(filter(None, answers))}, where, problems)
    if entry is None:
        return None
    if entry.image not in images:
        problems.append(f"{where}: image {entry.image!r} is none of {', '.join(images) or 'none'}")
    try:
        GenerationConfig.of(**entry.settings)
    except (ValueError, TypeError) as error:
        problems.append(f"{where}: {error}")
    return entry


def _build(cls: type, row: Any, where: str, problems: list[str]) -> Any:
    """The dataclass made of the row; None, and a problem, where its fields are others."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    needed = {n for n, field in fields.items() if field.default is dataclasses.MISSING}
    if not isinstance(row, dict) or not needed <= set(row) <= set(fields):
        found = ", ".join(row) if isinstance(row, dict) else repr(row)
        problems.append(f"{where}: found {found}, expected {', '.join(fields)}")
        return None
    if "tokens" in row:
        row = row | {"tokens": tuple(row["tokens"])}
    return cls(**row)
