"""Reads answers of other programs: our JSON lines, or the formats of benchmarks' own tools.

{"id": "7", "text": "a cup"}                   our JSON lines; `scores` if choices were ranked
{"question_id": 7, "text": "a cup", ...}       LLaVA's JSON lines
[{"question_id": 7, "answer": "a cup"}, ...]   a JSON list, as the VQA tools read
[{"image_id": 7, "caption": "a cup"}, ...]     a JSON list, as COCO's caption tools read
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_instructblip import files
from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics.metric import MetricError, listed
from jax_instructblip.evaluation.metrics.table import normalise_as
from jax_instructblip.evaluation.predictions import Prediction, parse_row, unique_rows
from jax_instructblip.evaluation.task import Task

# Other formats, each by the field that identifies it: their field -> ours, "" if it is ignored.
_LAYOUTS: dict[str, dict[str, str]] = {
    "question_id": {
        **{"question_id": "id", "answer": "text", "text": "text", "prompt": "prompt"},
        **dict.fromkeys(("answer_id", "category", "image", "metadata", "model_id"), ""),
    },
    "image_id": {"image_id": "id", "caption": "text"},
}
_SAYING = ("text", "scores", "problem")  # a row without any of these has nothing to score


def read_given(path: Path) -> list[Prediction]:
    """Reads a file of answers into rows with distinct ids.

    Raises:
      MetricError: lists all rows that are invalid or empty, or ids that are used twice; or the file
        has no answer at all.
    """
    rows, wrong = [], []
    for where, fields, reason in _items(path):
        try:
            if reason:
                raise ValueError(reason)
            rows.append(_row(fields))
        except ValueError as error:
            wrong.append(f"{path}{where}: {error}")
    if wrong:
        raise MetricError("\n  ".join([f"{len(wrong)} rows of {path} are no answers:", *wrong]))
    rows = unique_rows(path, rows)
    if not any(row.text.strip() or row.scores for row in rows):
        raise MetricError(f"{path}: none of its {len(rows)} rows holds an answer: all are empty")
    return rows


def complete(
    task: Task, path: Path, rows: Sequence[Prediction], records: Sequence[Record]
) -> tuple[list[Prediction], list[str]]:
    """Returns the rows in the order of `records`, with missing fields filled in, and notes.

    Prompt and right answers are filled in from the record, the text from the best score; `text` is
    normalised. There is a single note, if answers are empty, or none. Each record must have exactly
    one row (`check_ids`). `path` is named in errors.

    Raises:
      MetricError: rows have only scores, but the task's metric compares texts.
    """
    by_id = {row.id: row for row in rows}
    texts = not task.protocol.ranking or bool(task.candidates)
    done, mute = [], []
    for record in records:
        row = by_id[record.id]
        text = row.text or _best(row, () if texts else record.choices)
        if texts and row.scores and not text and not row.problem:
            mute.append(row.id)
        try:
            prompt = row.prompt or task.prompt(record)
        except ValueError:  # the record lacks a text that the prompt needs
            prompt = record.prompt
        normalised = normalise_as(task.protocol.metric, text)
        answers = record.answers or row.answers
        done.append(
            dataclasses.replace(
                row, prompt=prompt, text=text, normalised=normalised, answers=answers
            )
        )
    if mute:
        raise MetricError(
            f"{path}: {listed('rows have scores, but neither text nor candidates', mute)}; the "
            f"metric of {task.name} compares texts: name the best answer in `text`"
        )
    empty = [row.id for row in done if not (row.text.strip() or row.scores or row.problem)]
    return done, [f"{listed('answers are empty, and count as wrong', empty)}"] if empty else []


def _items(path: Path) -> Iterator[tuple[str, Any, str]]:
    """Yields (place, fields, problem) of each row; place is `:LINE`, or `[NUMBER]` in a list."""
    if _begins_as_list(path):
        rows = files.read_json(path, list, limit=files.ANNOTATION_LIMIT)
        yield from ((f"[{number}]", row, "") for number, row in enumerate(rows))
        return
    for number, fields, reason in files.scan_jsonl(path):
        yield f":{number}", fields, reason


def _begins_as_list(path: Path) -> bool:
    files.require_file(path)
    with path.open("rb") as file:
        while (byte := file.read(1)) in (b" ", b"\t", b"\r", b"\n"):
            pass
    return byte == b"["


def _row(fields: Any) -> Prediction:
    if isinstance(fields, dict) and "id" not in fields:
        for telling, layout in _LAYOUTS.items():
            if telling in fields and fields.keys() <= layout.keys():
                named = [(layout[name], value) for name, value in fields.items() if layout[name]]
                if len(dict(named)) < len(named):
                    raise ValueError("`text` and `answer` are both given, expected one of them")
                fields = dict(named)
    row = parse_row(fields)
    if not any(name in fields for name in _SAYING):
        raise ValueError(f"it has none of {', '.join(_SAYING)}: there is nothing to score")
    return row


def _best(row: Prediction, choices: Sequence[str]) -> str:
    """Returns the candidate with the highest score; "" if scores and candidates do not match."""
    names = row.candidates or choices
    return names[int(np.argmax(row.scores))] if row.scores and len(names) == len(row.scores) else ""
