r"""Reads JSON files of whole conversations in LLaVA's layout, one record a conversation.

    [{"id": "1", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}]

`image` may be a list, or be missing in a row without images. A turn may also be written as
`{"role": "user" or "assistant", "content"}`. All turns are kept as they are, `<image>` included;
`Conversation.from_record` makes a conversation of such a record.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from jax_instructblip import files
from jax_instructblip.data.conversation import ASSISTANT, USER, Conversation, Turn
from jax_instructblip.data.records import Record, RecordError
from jax_instructblip.fields import text_problem

SPEAKERS = {"human": USER, "gpt": ASSISTANT, "user": USER, "assistant": ASSISTANT}
# The names of a turn's fields: speaker and text.
_LAYOUTS = (("from", "value"), ("role", "content"))
_START = 1 << 16  # bytes of a file that tell its layout


def read_llava_json(
    path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> list[Record]:
    """Returns the records of a file, in its order.

    `images` is the folder that the names of images are relative to, by default the file's own.
    Images must exist, but are not opened. A row without an id gets `NAME:ROW`; a row with the id of
    an earlier row gets `#2` (`#3` ...) after it, for LLaVA's ids are those of images.

    Raises:
        RecordError: the file has no records, or bad rows, all listed as `FILE: row N: reason`.
    """
    records, problems, bad = [], [], 0
    for row, record, reasons in scan_llava_json(path, images):
        if record is not None:
            records.append(record)
        bad += record is None
        problems += [f"{path}: row {row}: {reason}" for reason in reasons]
    if problems:
        raise RecordError(
            f"{path}: {bad} bad row{'s' * (bad > 1)} beside {len(records)} good; nothing was read. "
            "Correct or delete these:",
            problems,
        )
    if not records:
        raise RecordError(f"{path} holds no records:", ["its list is empty"])
    return records


def scan_llava_json(
    path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> Iterator[tuple[int, Record | None, list[str]]]:
    """Yields `(row, record, reasons)` for each row, from row 1 on, as `read_llava_json` reads it.

    A good row has a record and no reasons; a bad row has None as its record.
    """
    path = pathlib.Path(path)
    folder = path.parent if images is None else pathlib.Path(images)
    uses: collections.Counter[str] = collections.Counter()
    for row, fields in enumerate(
        files.read_json(path, list, limit=files.ANNOTATION_LIMIT), start=1
    ):
        try:
            record = _record(fields, f"{path.stem}:{row}", folder)
        except RecordError as error:
            yield row, None, error.problems
            continue
        uses[record.id] += 1
        if uses[record.id] > 1:
            record = dataclasses.replace(record, id=f"{record.id}#{uses[record.id]}")
        yield row, record, []


def holds_conversations(path: str | os.PathLike[str]) -> bool:
    """Tells whether a file is a JSON list with `conversations`, by its first 64 KiB."""
    files.require_file(path)
    with pathlib.Path(path).open("rb") as file:
        start = file.read(_START).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"[") and b'"conversations"' in start


def _record(fields: Any, name: str, folder: pathlib.Path) -> Record:
    """Returns the record of a row; `name` is the id for a row without one."""
    problems: list[str] = []
    if not isinstance(fields, dict):
        raise RecordError(name, [f"found {files.kind_of(fields)}, expected an object {{...}}"])
    images = _images(fields.get("image", []), folder, problems)
    turns = _turns(fields.get("conversations"), problems)
    row_id = fields.get("id", name)
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        problems.append(f"id is {files.kind_of(row_id)}, expected text or a whole number")
    if problems:
        raise RecordError(name, problems)
    conversation = Conversation(str(row_id), turns, len(images))
    if problems := list(conversation.problems(answered=True)):
        raise RecordError(name, problems)
    texts = [text for _, text in turns]
    rounds = list(zip(texts[::2], texts[1::2], strict=True))
    (question, answer), history = rounds[-1], tuple(rounds[:-1])
    return Record(conversation.id, images, question, (answer,), history=history)


def _images(value: Any, folder: pathlib.Path, problems: list[str]) -> tuple[str, ...]:
    """Returns the paths of a row's images; adds a problem for each that is not a file."""
    names = value if isinstance(value, list) else [value]
    paths = []
    for index, name in enumerate(names):
        field = f"image[{index}]" if isinstance(value, list) else "image"
        if not isinstance(name, str) or not name.strip():
            problems.append(f"{field} is {files.kind_of(name)}, expected the path of an image")
        elif text_problem(name):
            problems.append(f"{field} {text_problem(name)}")
        elif not (path := folder / name).is_file():
            why = "is a folder" if path.is_dir() else "does not exist"
            problems.append(f"image {name!r} {why} (looked for {path})")
        else:
            paths.append(str(path))
    return tuple(paths)


def _turns(said: Any, problems: list[str]) -> tuple[Turn, ...]:
    """Returns the turns in a row's `conversations`; adds a problem for each unreadable one."""
    if not isinstance(said, list):
        problems.append(f"conversations is {files.kind_of(said)}, expected a list of turns")
        return ()
    turns = []
    for index, turn in enumerate(said, start=1):
        fields = turn if isinstance(turn, dict) else {}
        layout = next((names for names in _LAYOUTS if fields.keys() >= set(names)), None)
        if layout is None:
            problems.append(f"turn {index} is not of the form {{'from': ..., 'value': ...}}")
            continue
        speaker, text = (fields[name] for name in layout)
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            problems.append(
                f"turn {index}: {layout[0]} is {speaker!r}, expected one of {', '.join(SPEAKERS)}"
            )
        elif not isinstance(text, str):
            problems.append(f"turn {index}: {layout[1]} is {files.kind_of(text)}, expected text")
        else:
            turns.append(Turn(SPEAKERS[speaker], text))
    return tuple(turns)
