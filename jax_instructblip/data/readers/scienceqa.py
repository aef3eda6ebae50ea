r"""ScienceQA as LLaVA is tuned on it and asked: all problems, their lectures and explanations.

    Which is farthest north?          {lecture} {solution} The answer is A.
    Context: See the map.
    Options: (A) Oslo (B) Rome
    <image>

The left text is what the human says (QCM: question, context, multiple choice), the right one what
the model says (LEA: lecture, explanation, answer). Problems without an image are read too;
`choices.py` has InstructBLIP's benchmark, of those with one. `split` is train, val or test, `raw`
the folder of the original files.
"""

import os
import pathlib
import string
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax_instructblip.data.readers.annotations import (
    AnnotationError,
    field,
    inside,
    pick_layout,
    read_json,
    require,
    text_of,
    unique,
)
from jax_instructblip.data.readers.choices import SCIENCEQA, index_of_choice
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.records import Record

NAME = "scienceqa_qcm"
LETTERS = string.ascii_uppercase
# The subjects, as the published tables abbreviate them.
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
GRADES = ("G1-6", "G7-12")


class Problem(NamedTuple):
    """A problem of ScienceQA.

    Attributes:
      id: its key in the file.
      question: the question, without hint and choices.
      choices: the choices, in their order.
      correct: index of the right choice.
      hint: a text that belongs to the question; "" if there is none.
      image: path of the image; "" if there is none.
      lecture: background knowledge; may be "".
      solution: the explanation of the answer; may be "".
      subject: a value of `SUBJECTS`.
      grades: one of `GRADES`.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    correct: int
    hint: str
    image: str
    lecture: str
    solution: str
    subject: str
    grades: str


def read_scienceqa_qcm(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields all problems of a split; the prompt is `question_text`, `context` the bare hint.

    The one answer is the text of the right choice. The task is `scienceqa_qcm/SUBJECT/GRADES`, such
    as `scienceqa_qcm/NAT/G7-12`. A problem without an image has no images. Images below `raw`:
    `images/test/4/image.png`.
    """
    return unique(
        Record(
            id=each.id,
            images=(each.image,) if each.image else (),
            prompt=question_text(each.question, each.hint, each.choices),
            answers=(each.choices[each.correct],),
            task=f"{NAME}/{each.subject}/{each.grades}",
            split=split,
            choices=each.choices,
            correct=each.correct,
            context=each.hint,
        )
        for each in _problems(raw, split)
    )


def read_conversations(
    raw: pathlib.Path, split: str, folder: pathlib.Path
) -> Iterator[dict[str, Any]]:
    """Yields all problems of a split as rows of LLaVA's layout (`data/llava_json.py`).

    Images are named relative to `folder`, in which the file of the rows will be.
    """
    # Links are followed, for `..` leads out of the folder that a link leads to.
    to_raw = os.path.relpath(os.path.realpath(raw), os.path.realpath(folder))
    for each in _problems(raw, split):
        question = question_text(each.question, each.hint, each.choices)
        answer = answer_text(each.lecture, each.solution, LETTERS[each.correct])
        row: dict[str, Any] = {"id": each.id}
        if each.image:
            row["image"] = os.path.join(to_raw, os.path.relpath(each.image, raw))
            question += "\n<image>"
        said = zip(("human", "gpt"), (question, answer), strict=True)
        yield row | {"conversations": [{"from": name, "value": text} for name, text in said]}


def question_text(question: str, hint: str, choices: Sequence[str]) -> str:
    """Returns what the human says: question, context ("N/A" without a hint), lettered options."""
    options = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, choices, strict=False))
    return _spaced(f"{question}\nContext: {hint or 'N/A'}\nOptions: {options}")


def answer_text(lecture: str, solution: str, letter: str) -> str:
    """Returns what the model says: lecture, explanation and answer, in this order.

    `solution` is the explanation, `letter` that of the right choice, such as "A".
    """
    return _spaced(f"{lecture} {solution} The answer is {letter}.")


def _spaced(text: str) -> str:
    """Returns `text` with one space for every two, as the original writer leaves it, stripped."""
    return text.replace("  ", " ").strip()


def _problems(raw: pathlib.Path, split: str) -> Iterator[Problem]:
    """Yields the problems of a split, from a JSON object that has each problem by its id.

    A problem has `question`, `choices`, `answer` (an index), `hint`, `image`, `split`, `lecture`,
    `solution`, `subject` and `grade`.
    """
    _, (path,) = pick_layout(raw, split, SCIENCEQA)
    for name, row in read_json(path, dict).items():
        where = f"{path}: problem {name}"
        if field(require(row, dict, where), "split", str, where) == split:
            yield _problem(raw, split, name, row, where)


def _problem(raw: pathlib.Path, split: str, name: str, row: dict[str, Any], where: str) -> Problem:
    choices = field(row, "choices", list, where)
    for index, choice in enumerate(choices):
        if not require(choice, str, f"{where}: choices[{index}]").strip():
            raise AnnotationError(f"{where}: choices[{index}] is blank: correct the row")
    if not 1 <= len(choices) <= len(LETTERS):
        raise AnnotationError(f"{where}: {len(choices)} choices, expected 1 to {len(LETTERS)}")
    subject = field(row, "subject", str, where)
    if subject not in SUBJECTS:
        raise AnnotationError(
            f"{where}: subject is {subject!r}, expected one of {', '.join(SUBJECTS)}"
        )
    image = field(row, "image", (str, type(None)), where)
    return Problem(
        id=name,
        question=text_of(row, "question", where),
        choices=tuple(choices),
        correct=index_of_choice(row, "answer", where),
        hint=field(row, "hint", str, where).strip(),
        image=inside(raw, "images", split, name, image, where=where) if image else "",
        lecture=field(row, "lecture", str, where).strip(),
        solution=field(row, "solution", str, where).strip(),
        subject=SUBJECTS[subject],
        grades=_grades(field(row, "grade", str, where), where),
    )


def _grades(grade: str, where: str) -> str:
    """Returns the one of `GRADES` that a grade such as "grade7" belongs to."""
    number = grade.removeprefix("grade")
    if not (number.isdecimal() and 1 <= int(number) <= 12):
        raise AnnotationError(f"{where}: grade is {grade!r}, expected grade1 to grade12")
    return GRADES[int(number) > 6]


DATASETS = (
    Dataset(
        name=NAME,
        family="knowledge-grounded image QA",
        held_in=False,
        read=read_scienceqa_qcm,
        files=SCIENCEQA,
        counts={"train": 12_726, "val": 4_241, "test": 4_241},
        templates="",
        licence="CC BY-NC-SA 4.0",
        source="https://github.com/lupantech/ScienceQA (data/scienceqa/problems.json, "
        "tools/download.sh for images)",
        notes="All problems, as LLaVA is asked them; images in images/SPLIT/ID/. With "
        "--conversations the file that LLaVA is tuned on is written (QCM-LEA).",
        conversations=read_conversations,
    ),
)
