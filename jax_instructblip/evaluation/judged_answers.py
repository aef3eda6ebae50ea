"""Answers in the form that judges read, LLaVA's: one JSON line for each question.

    {"question_id": 0, "prompt": "What ...?", "text": "The ...", "image": "000000441147.jpg",
     "category": "conv", "model_id": "llava-1.5-7b", "metadata": {}}

`prompt` is the question as it was asked, `text` the answer. `image` is the name of its file, "" if
the dataset was prepared. `metadata` says why a question could not be asked (`problem`).
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_instructblip.atomic import write_file
from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.predictions import Prediction
from jax_instructblip.evaluation.task import Task

FOLDER = "answers"
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")  # ids that are numbers in the files of questions


def file_of(task: Task) -> str:
    """Returns the path of a task's file of answers, relative to the output folder."""
    return f"{FOLDER}/{task.name}.jsonl"


def write_answers(out: Path, task: Task, rows: Sequence[Prediction], model: str) -> None:
    """Writes the rows of all records of a task to `file_of(task)` in the folder `out`.

    `rows` has one for each record, in their order; `model` is the name of the model that answered.
    """
    path = out / file_of(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps(_answer(row, task.records[number], model), ensure_ascii=False)
        for number, row in enumerate(rows)
    )
    write_file(path, "".join(f"{line}\n" for line in lines))


def _answer(row: Prediction, record: Record, model: str) -> dict[str, Any]:
    image = record.images[0] if record.images else ""
    return {
        "question_id": int(row.id) if _NUMBER.fullmatch(row.id) else row.id,
        "prompt": row.prompt,
        "text": row.text,
        "image": os.path.basename(image) if isinstance(image, str) else "",
        "category": record.task.rpartition("/")[2],
        "model_id": model,
        "metadata": {"problem": row.problem} if row.problem else {},
    }
