"""Encodes a text in parts, so that no part gets a space or control token the text does not have.

SentencePiece puts a space in front of every text that it is given. A part in the middle of a text
must not get one, and control tokens (`</s>`) must come from the template alone: a user who writes
`</s>` means these four characters.
"""

import json
import os
import pathlib
from collections.abc import Sequence

from tokenizers import Tokenizer as Backend

from jax_instructblip.data.spec import IGNORE
from jax_instructblip.data.tokenizer_files import Tokenizer
from jax_instructblip.files import read_json


def reads_as_legacy(folder: str | os.PathLike[str]) -> bool:
    """Tells whether text after a control token is a new text, which gets a space in front.

    The first LLaMA tokenizers of transformers did so, and Vicuna and LLaVA were trained with them;
    a tokenizer folder of the newer kind says `"legacy": false`. Without this entry the answer is
    True, also for a folder that transformers 5 has saved, for it drops the entry.
    """
    settings = pathlib.Path(folder) / "tokenizer_config.json"
    return not settings.is_file() or read_json(settings, dict).get("legacy") is not False


class PieceEncoder:
    """Encodes the parts of a text."""

    def __init__(self, tokenizer: Tokenizer):
        """Copies the tokenizer, which stays as it is."""
        written = tokenizer.backend_tokenizer.to_str()
        bare = _without_space_in_front(json.loads(written))
        self._first = _plain(written)
        self._inner = self._first if bare is None else _plain(json.dumps(bare))

    def __setstate__(self, state: dict) -> None:
        """Restores a copy for another process; pickling loses `encode_special_tokens`."""
        self.__dict__.update(state)
        for backend in (self._first, self._inner):
            backend.encode_special_tokens = True

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Returns the ids of a part, in which no control token is recognised.

        `first` says whether the part is at the start of a text.
        """
        backend = self._first if first else self._inner
        return backend.encode(text, add_special_tokens=False).ids


class PieceWriter:
    """Collects ids and targets; neighbouring texts, both learned or both not, are encoded as one.

    Attributes:
      tokens: the ids.
      targets: the same id where it is learned, else IGNORE.
      turns: for each id the number of its turn, 1 for the first.
      image_at: for each image the index of the id before which it stands.
    """

    def __init__(self, pieces: PieceEncoder, *, legacy: bool):
        """Starts without ids; `legacy` is the answer of `reads_as_legacy`."""
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.turns: list[int] = []
        self.image_at: list[int] = []
        self._turn = 1
        self._pieces, self._legacy = pieces, legacy
        self._text, self._learned, self._first = "", False, True

    def start_turn(self, number: int) -> None:
        """Starts a turn; its text is encoded on its own."""
        self.flush()
        self._turn = number

    def text(self, text: str, learned: bool) -> None:
        """Appends a text, in which no control token is recognised."""
        if learned != self._learned:
            self.flush()
        self._text, self._learned = self._text + text, learned

    def control(self, token: int, learned: bool, *, starts: bool = False) -> None:
        """Appends a control token; `starts` says that the text after it is a new text."""
        self.flush()
        self._append([token], learned)
        self._first = starts or self._legacy

    def image(self, marks: Sequence[int]) -> None:
        """Notes the place of an image, between two control tokens if `marks` has their ids.

        `marks` is (id before the image, id after it), or empty.
        """
        self.flush()
        self._append(marks[:1], learned=False)
        self.image_at.append(len(self.tokens))
        self._append(marks[1:], learned=False)
        self._first = self._legacy or not marks

    def flush(self) -> None:
        """Encodes the text so far; text that follows is encoded on its own."""
        if self._text:
            self._append(self._pieces.encode(self._text, first=self._first), self._learned)
            self._text, self._first = "", False

    def _append(self, ids: Sequence[int], learned: bool) -> None:
        self.tokens += ids
        self.targets += ids if learned else [IGNORE] * len(ids)
        self.turns += [self._turn] * len(ids)


def _plain(written: str) -> Backend:
    backend = Backend.from_str(written)
    backend.encode_special_tokens = True  # control tokens are read as ordinary text
    return backend


def _without_space_in_front(written: dict) -> dict | None:
    """Returns a tokenizer.json that adds no space in front, or None where it adds none anyway.

    T5's, which splits text at spaces, is not changed either: there every word has a space in front.
    """
    normalizers, splitters = (_steps(written[key], key) for key in ("normalizer", "pre_tokenizer"))
    kinds = {step["type"] for step in (*normalizers, *splitters)}
    if "WhitespaceSplit" in kinds or not kinds & {"Prepend", "Metaspace"}:
        return None
    kept = [step for step in normalizers if step["type"] != "Prepend"]
    bare = [
        step | {"prepend_scheme": "never"} if step["type"] == "Metaspace" else step
        for step in splitters
    ]
    return written | {
        "normalizer": {"type": "Sequence", "normalizers": kept},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": bare},
    }


def _steps(part: dict | None, key: str) -> list[dict]:
    """Returns the steps of a normalizer or pre-tokenizer, which may be none, one or a sequence."""
    if part is None:
        return []
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[key]
    return part[inner] if part["type"] == "Sequence" else [part]
