"""The journal of a run: every reply of the endpoint, kept on disk as it arrives.

    {"journal": 1, "facts": {"model": ..., "prompts": ...}}
    {"id": "1/conversation", "digest": ..., "text": ..., "problem": "", "tokens": 812}

The first line says what is asked and how. Each other line is a reply: usable if `problem` is empty.
A run that was killed goes on from it; a last line that the kill cut short is dropped.
"""

import collections
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jax_instructblip import files
from jax_instructblip.atomic import encode_utf8, lock_alone

VERSION = 1
_START = b'{"journal": '  # of a file; a kill may have cut it short
_ENTRY = {"id": str, "digest": str, "text": str, "problem": str, "tokens": int}


class Request(NamedTuple):
    """One question to the endpoint.

    Attributes:
      id: its name, unique within a run.
      messages: objects with `role` and `content`, in the layout of chat endpoints.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]

    def digest(self) -> str:
        """Returns the first 16 digits of the SHA-256 of its messages."""
        return digest([dict(message) for message in self.messages])


def digest(value: Any) -> str:
    """Returns the first 16 digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """The replies so far, in memory and in a file that only one process may have open.

    Attributes:
      path: the file.
      answers: the usable replies by the ids of their requests.
      failures: the number of unusable replies by id.
      problems: what was wrong with the last one, by id.
      tokens: tokens of all replies together, the unusable included.
    """

    def __init__(self, path: Path, file: BinaryIO):
        """Keeps the open file; `open_journal` reads what it holds."""
        self.path, self._file = path, file
        self.answers: dict[str, str] = {}
        self.failures: collections.Counter[str] = collections.Counter()
        self.problems: dict[str, str] = {}
        self.tokens = 0
        self._digests: dict[str, str] = {}

    def add(self, request: Request, text: str, problem: str, tokens: int) -> None:
        """Counts a reply, appends it and syncs the file to disk.

        `problem` is the reason why `text` cannot be used, "" if it can; `tokens` are those of
        request and reply.
        """
        entry = {"id": request.id, "digest": request.digest(), "text": text}
        entry |= {"problem": problem, "tokens": tokens}
        self.write(entry)
        self.count_reply(entry)

    def count_reply(self, entry: Mapping[str, Any]) -> None:
        """Counts a reply that is in the file already; `entry` is its line.

        Raises:
          ValueError: its request was answered before, or had other messages.
        """
        name, problem = entry["id"], entry["problem"]
        if name in self.answers:
            raise ValueError(f"{name!r} is answered twice")
        if self._digests.setdefault(name, entry["digest"]) != entry["digest"]:
            raise ValueError(f"{name!r} stands for two different requests")
        self.tokens += entry["tokens"]
        if problem:
            self.failures[name] += 1
            self.problems[name] = problem
        else:
            self.answers[name] = entry["text"]

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line without counting it, and syncs the file to disk."""
        self._file.write(encode_utf8(json.dumps(line, ensure_ascii=False) + "\n"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def check(self, requests: Sequence[Request]) -> None:
        """Raises a ValueError if replies are to others than `requests`, or to other messages."""
        asked = {request.id: request.digest() for request in requests}
        gone = [name for name in self._digests if name not in asked]
        changed = [
            name for name in self._digests if name in asked and asked[name] != self._digests[name]
        ]
        problems = [
            f"{len(names)} {what}, the first of them {names[0]!r}"
            for names, what in (
                (gone, "replies are to requests that are not made now"),
                (changed, "replies are to requests with other messages"),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"{self.path} is the journal of other data: {'; '.join(problems)}. Give the files "
                "that it was begun with, or another --out"
            )


@contextlib.contextmanager
def open_journal(path: Path, facts: Mapping[str, Any]) -> Iterator[Journal]:
    """Yields the journal in a file, which is made if it does not exist.

    `facts` is a JSON object of everything that all requests depend on.

    Raises:
      ValueError: the file was begun with other facts, is no journal, has a damaged line, or another
        process has it open.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        lock_alone(file.fileno(), path)
        _require_journal(path, file)
        _drop_unfinished(file)
        journal = Journal(path, file)
        wanted = json.loads(json.dumps(facts))
        lines = files.read_jsonl(path)
        begun = next(lines, None)
        if begun is None:
            journal.write({"journal": VERSION, "facts": wanted})
        else:
            _compare(path, begun[1], wanted)
        for number, entry in lines:
            try:
                _require_entry(entry)
                journal.count_reply(entry)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
        yield journal


def _require_journal(path: Path, file: BinaryIO) -> None:
    """Raises a ValueError if a file does not begin as a journal does; it then stays as it is."""
    file.seek(0)
    start = file.read(len(_START))
    if not _START.startswith(start):
        raise ValueError(f"{path} is no journal of requests: choose another --out")


def _drop_unfinished(file: BinaryIO) -> None:
    """Cuts off what follows the last newline: a line that a kill cut short."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(position - 65_536, 0)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    file.truncate(position)


def _compare(path: Path, begun: Any, wanted: Mapping[str, Any]) -> None:
    """Raises a ValueError unless the first line of a journal holds the facts `wanted`."""
    if not isinstance(begun, dict) or not isinstance(begun.get("facts"), dict):
        raise ValueError(f"{path} is no journal of requests: choose another --out")
    if begun.get("journal") != VERSION:
        raise ValueError(
            f"{path} is a journal of version {begun.get('journal')!r}, this program reads {VERSION}"
        )
    facts = begun["facts"]
    wrong = [
        f"{name} was {facts.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted(facts.keys() | wanted.keys())
        if facts.get(name) != wanted.get(name)
    ]
    if wrong:
        raise ValueError(
            "\n  ".join(
                [f"{path} was begun with other prompts or settings:", *wrong]
                + ["give the same again, or another --out"]
            )
        )


def _require_entry(entry: Any) -> None:
    """Raises a ValueError unless `entry` is a reply as `Journal.add` writes it."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY.keys():
        raise ValueError(f"expected an object with {', '.join(_ENTRY)}")
    for name, kind in _ENTRY.items():
        if type(entry[name]) is not kind:
            expected = files.KINDS[kind]
            raise ValueError(f"{name} is {files.kind_of(entry[name])}, expected {expected}")
