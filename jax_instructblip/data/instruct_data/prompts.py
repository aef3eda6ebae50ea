"""Prompts that make a language model write instruction data: a system message and examples.

A folder of prompts has a folder for each kind, as LLaVA's has:

    conversation/system_message.txt     what the model is told
    conversation/000_caps.txt           the context of an example, as `contexts.py` writes it
    conversation/000_conv.txt           the answer to it, as `rounds.py` reads it
    detail_description/...              likewise, as complex_reasoning/...
"""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jax_instructblip import files, stores
from jax_instructblip.data.contexts import Context, parse_context
from jax_instructblip.data.instruct_data.kinds import KINDS
from jax_instructblip.data.instruct_data.rounds import find_problem
from jax_instructblip.data.records import RecordError
from jax_instructblip.endpoint.journal import digest
from jax_instructblip.lookup import find

SHIPPED = Path(__file__).with_name("prompts")

_SYSTEM = "system_message.txt"
_NAME = re.compile(r"(\d+)_(caps|conv)\.txt")


class Example(NamedTuple):
    """A context, and the answer that the model should give to it."""

    context: Context
    answer: str


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of one kind.

    Attributes:
      kind: a key of `KINDS`.
      system: the system message.
      examples: the examples that are shown before the context asked about, in their order.
    """

    kind: str
    system: str
    examples: tuple[Example, ...]

    def messages(self, context: Context) -> tuple[Mapping[str, str], ...]:
        """Returns the chat messages that ask about the image of `context` (`Request.messages`)."""
        return *self._before, _message("user", context.text(boxes=KINDS[self.kind]))

    @functools.cached_property
    def _before(self) -> tuple[Mapping[str, str], ...]:
        """The messages that are the same for all images."""
        said = [_message("system", self.system)]
        for example in self.examples:
            said += [
                _message("user", example.context.text()),
                _message("assistant", example.answer),
            ]
        return tuple(said)

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that change with any of the texts."""
        return digest([dict(message) for message in self._before])


def read_prompts(
    folder: str | os.PathLike[str] = SHIPPED, kinds: Sequence[str] = tuple(KINDS)
) -> dict[str, Prompts]:
    """Returns the prompts of each kind from a folder, by default the shipped ones.

    Raises:
      RecordError: lists every file that is missing, unknown, or has wrong content.
      ValueError: an unknown kind.
      OSError: there is no such folder.
    """
    for kind in kinds:
        find(KINDS, kind, "kind of request")
    root = stores.input_path(folder, "the folder of prompts")
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder of prompts")
    prompts, problems = {}, []
    for kind in kinds:
        try:
            prompts[kind] = _read_kind(root / kind, kind)
        except RecordError as error:
            problems += error.problems
    if problems:
        raise RecordError(f"{root} has prompts that cannot be used:", problems)
    return prompts


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _read_kind(folder: Path, kind: str) -> Prompts:
    if not (folder / _SYSTEM).is_file():
        raise RecordError("", [f"{folder / _SYSTEM} is missing"])
    numbers: dict[str, set[str]] = {}
    problems, examples = [], []
    for path in sorted(folder.glob("*.txt")):
        if match := _NAME.fullmatch(path.name):
            numbers.setdefault(match[1], set()).add(match[2])
        elif path.name != _SYSTEM:
            problems.append(f"{path} is neither {_SYSTEM} nor NUMBER_caps.txt or NUMBER_conv.txt")
    for number, parts in numbers.items():
        for lacking in {"caps", "conv"} - parts:
            problems.append(f"{folder / f'{number}_{lacking}.txt'} is missing")
        if len(parts) < 2:
            continue
        path = folder / f"{number}_conv.txt"
        answer = files.read_text(path).rstrip("\n")
        if problem := find_problem(kind, answer):
            problems.append(f"{path}: {problem}")
        caps = folder / f"{number}_caps.txt"
        try:
            examples.append(Example(parse_context(files.read_text(caps), str(caps)), answer))
        except RecordError as error:
            problems += error.problems
    system = files.read_text(folder / _SYSTEM).rstrip("\n")
    if not system.strip():
        problems.append(f"{folder / _SYSTEM} is empty")
    if problems:
        raise RecordError("", problems)
    return Prompts(kind, system, tuple(examples))
