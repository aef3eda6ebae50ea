"""Published answers of released models, with their questions and images.

They are in a JSON file, `FACTS` by default:

    {"images": {NAME: {"description", "url", "sha256": of the file, if known}},
     "entries": [{"name", "model": a released model's name, or "" for any, "image": NAME, "prompt",
                  "settings": of `generate`, "source",
                  "published": [{"by", "text", "tokens": new ids with eos, if known}],
                  "note": optional}]}

An entry can have several published answers, made by different code or precision; any is right.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_instructblip.files import read_json
from jax_instructblip.inference.generation_config import GenerationConfig

FACTS = Path(__file__).with_name("published.json")


@dataclasses.dataclass(frozen=True)
class Image:
    """An image: description, URL, and the sha256 of its file ("" if unknown)."""

    description: str
    url: str
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class Published:
    """A published answer: who published it, its text, its new token ids (() if unknown)."""

    by: str
    text: str
    tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """One question with its published answers; the fields are those of the JSON file."""

    name: str
    model: str
    image: str
    prompt: str
    settings: Mapping[str, Any]
    published: tuple[Published, ...]
    source: str
    note: str = ""


def read_facts(path: str | os.PathLike) -> tuple[dict[str, Image], list[Entry]]:
    """Reads a file of published answers; returns the images by name, and the entries.

    Raises:
      ValueError: the file is no such JSON; lists every wrong entry, with what was expected.
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


def is_published_file(image: Image, path: str | os.PathLike) -> bool:
    """Returns True if the file's sha256 is the published one, or none is known."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return not image.sha256 or digest == image.sha256


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
    """Returns `cls` built from the fields of `row`; None if they do not fit.

    Then a message that begins with `where` is appended to `problems`.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    needed = {n for n, field in fields.items() if field.default is dataclasses.MISSING}
    if not isinstance(row, dict) or not needed <= set(row) <= set(fields):
        shown = ", ".join(row) if isinstance(row, dict) else repr(row)
        problems.append(f"{where}: found {shown}, expected {', '.join(fields)}")
        return None
    if "tokens" in row:
        row = row | {"tokens": tuple(row["tokens"])}
    return cls(**row)
