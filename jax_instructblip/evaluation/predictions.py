"""Predictions on disk: JSON lines of finished datasets, and partial ones of interrupted runs.

OUT/predictions/NAME.jsonl      one row per record, in the order of the records
OUT/predictions/NAME.json       facts: dataset, prompt, settings, model weights
OUT/predictions/NAME.partial/   while answering: one file per process, rows in the order in which
                                they are answered; a line that a kill cut short is dropped
"""

import collections
import dataclasses
import difflib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_instructblip import files
from jax_instructblip.atomic import encode_utf8, write_file
from jax_instructblip.evaluation.metrics.metric import MetricError, listed
from jax_instructblip.files import parse_json, read_json


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer to one record: a line of `predictions/*.jsonl`.

    Attributes:
      id: the record's id.
      prompt: the prompt as it was asked.
      text: the generated answer; in a ranking, the best candidate.
      normalised: `text` as the metric compares it.
      score: the metric's value for this record; None if there is none.
      answers: the right answers.
      logprob: natural log-probability of `text`.
      candidates: in a ranking, the candidates in their order; of very many, only the best, best
        first.
      scores: the score of each of these candidates.
      problem: why the question could not be asked ("" if it could); it then counts as wrong.
      task: the record's dataset or family.
    """

    id: str
    prompt: str = ""
    text: str = ""
    normalised: str = ""
    score: float | None = None
    answers: tuple[str, ...] = ()
    logprob: float | None = None
    candidates: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    problem: str = ""
    task: str = ""

    def line(self) -> str:
        """Returns the row as one line of JSON, with its newline."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n"


def read_rows(path: Path) -> list[Prediction]:
    """Reads the rows of a predictions file that `Store` wrote.

    Raises:
      MetricError: lists all invalid lines, or ids that are used twice; or the file is empty.
    """
    rows, wrong = [], []
    for number, fields, reason in files.scan_jsonl(path):
        try:
            if reason:
                raise ValueError(reason)
            rows.append(parse_row(fields))
        except ValueError as error:
            wrong.append(f"{path}:{number}: {error}")
    if wrong:
        raise MetricError("\n  ".join([f"{len(wrong)} lines of {path} are no answers:", *wrong]))
    return unique_rows(path, rows)


def unique_rows(path: Path, rows: list[Prediction]) -> list[Prediction]:
    """Returns `rows`; raises a MetricError if there are none or an id is used twice."""
    again = [name for name, n in collections.Counter(row.id for row in rows).items() if n > 1]
    if again:
        raise MetricError(f"{path}: {listed('ids are there more than once', again)}")
    if not rows:
        raise MetricError(f"{path} holds no answers: it is empty; expected one for each record")
    return rows


def parse_row(fields: Any) -> Prediction:
    """Builds a row from a JSON object, in which only `id` is required.

    Raises:
      ValueError: lists all unknown fields and all values of a wrong type.
    """
    if not isinstance(fields, dict) or "id" not in fields:
        raise ValueError("expected an object with `id`, and `text` or `scores`")
    wrong = []
    for name in sorted(set(fields) - set(_KINDS)):
        near = ["text"] if name == "answer" else difflib.get_close_matches(name, _KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_KINDS))}"
        wrong.append(f"unknown field {name!r}; {hint}")
    for name, (fits, expected) in _KINDS.items():
        if name in fields and not fits(fields[name]):
            wrong.append(f"{name} is {files.kind_of(fields[name])}, expected {expected}")
    if wrong:
        raise ValueError("; ".join(wrong))
    values: dict[str, Any] = {**fields, "id": str(fields["id"])}
    values |= {name: tuple(fields.get(name, ())) for name in ("answers", "candidates", "scores")}
    return Prediction(**values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _is_id(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def _is_list(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


_TEXT = (_is_text, "text")
_TEXTS = (_is_list(_is_text), "a list of texts")
_NUMBER = (lambda value: value is None or _is_number(value), "a finite number, or null")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (_is_id, "text or a whole number"),
    **dict.fromkeys(("task", "prompt", "text", "normalised", "problem"), _TEXT),
    **dict.fromkeys(("answers", "candidates"), _TEXTS),
    **dict.fromkeys(("score", "logprob"), _NUMBER),
    "scores": (_is_list(_is_number), "a list of finite numbers"),
}


def check_ids(path: Path, rows: Iterable[Prediction], ids: Sequence[str], name: str) -> None:
    """Raises a MetricError that lists missing and surplus ids unless rows and records match.

    `ids` are those of the records of the dataset `name`; `path` is the file of the rows.
    """
    answered, known = {row.id for row in rows}, set(ids)
    lacking = [each for each in ids if each not in answered]
    strange = sorted(answered - known)
    if len(lacking) == len(ids):
        raise MetricError(
            f"{path} has none of the {len(ids)} records of {name}: it is of another dataset or "
            f"split ({listed('ids that are not known', strange)})"
        )
    problems = [
        listed(f"records of {name} are not in {path}", lacking),
        listed(f"ids in {path} are of no record of {name}", strange),
    ]
    if any(problems):
        raise MetricError("; ".join(filter(None, problems)))


class Store:
    """The predictions of one dataset on disk; several processes may write to it together.

    Attributes:
      path: the file of all rows, which `finish` writes.
      partial: the folder of the rows so far.
    """

    def __init__(self, folder: Path, name: str, facts: Mapping[str, Any], process: int = 0):
        """Names the files of the dataset `name` in `folder`; writes nothing.

        `facts` say what is asked, of which model and how: existing rows with other facts are
        refused. `process` is the index of this process.
        """
        self.path = folder / f"{name}.jsonl"
        self.partial = folder / f"{name}.partial"
        self._facts_path = folder / f"{name}.json"
        self._facts = json.loads(json.dumps(facts))
        self._own = self.partial / f"{process}.jsonl"

    def begin(self, *, replace: bool = False) -> None:
        """Prepares the folder; rows of an interrupted run with the same facts are kept.

        Only one process calls it, before the others call `rows`. With `replace`, rows with other
        facts are deleted.

        Raises:
          ValueError: there are rows with other facts, and `replace` is False.
        """
        if replace and not self._is_ours():
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.partial, ignore_errors=True)
        elif self._facts_path.is_file():
            self._compare(read_json(self._facts_path, dict))
        elif self.path.is_file():
            raise ValueError(
                f"{self.path} does not say what was asked ({self._facts_path.name} is not there): "
                "remove it, or choose another --out"
            )
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._facts_path, json.dumps(self._facts, indent=1, ensure_ascii=False) + "\n")
        if self.path.is_file() and not self.partial.is_dir():
            return
        rows = self._unfinished()
        self.partial.mkdir(exist_ok=True)
        write_file(self.partial / "done.jsonl", "".join(row.line() for row in rows.values()))
        for path in self.partial.glob("*.jsonl"):
            if path.name != "done.jsonl":
                path.unlink()

    def rows(self) -> dict[str, Prediction]:
        """Returns the rows so far, by id.

        Raises:
          ValueError: process 0 has called `begin`, but its files are not visible to this process.
        """
        if not self._facts_path.is_file() or read_json(self._facts_path) != self._facts:
            raise ValueError(
                f"process 0 has written {self._facts_path}, which this process does not see: --out "
                "must be on a disk that all processes share"
            )
        rows = self._unfinished()
        if self.path.is_file():
            rows |= {row.id: row for row in read_rows(self.path)}
        return rows

    def append(self, rows: Sequence[Prediction]) -> None:
        """Appends rows to this process's file and syncs it to disk."""
        data = "".join(row.line() for row in rows)
        self.partial.mkdir(exist_ok=True)  # `begin` makes none beside a finished file
        with self._own.open("ab") as file:
            file.write(encode_utf8(data))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, rows: Sequence[Prediction]) -> None:
        """Writes the final file with all rows, and deletes the partial ones."""
        write_file(self.path, "".join(row.line() for row in rows))
        shutil.rmtree(self.partial, ignore_errors=True)

    def _unfinished(self) -> dict[str, Prediction]:
        rows = {}
        for path in sorted(self.partial.glob("*.jsonl")):
            lines = path.read_bytes().split(b"\n")[:-1]  # the last is empty or cut short
            for number, line in enumerate(lines, start=1):
                try:
                    row = parse_row(parse_json(line))
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {error}; remove the line") from error
                rows[row.id] = row
        return rows

    def _is_ours(self) -> bool:
        """Returns True if the facts on disk equal those of this store."""
        try:
            return read_json(self._facts_path) == self._facts
        except (ValueError, OSError):
            return False

    def _compare(self, recorded: Mapping[str, Any]) -> None:
        if recorded == self._facts:
            return
        wrong = [
            f"{name} was {recorded.get(name)!r}, now {self._facts.get(name)!r}"
            for name in sorted(recorded.keys() | self._facts.keys())
            if recorded.get(name) != self._facts.get(name)
        ]
        raise ValueError(
            "\n  ".join(
                [f"{self._facts_path.parent} holds answers to something else:", *wrong]
                + [f"choose another --out, or remove {self._facts_path.stem}.* there"]
            )
        )
