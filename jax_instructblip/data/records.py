"""`Record`, the form that samples of every dataset take, and the reader of JSON-lines files.

A JSON-lines file has one object a line:

    {"image": "photos/1.jpg", "prompt": "What is on the table?", "answer": "a cup"}

Fields: `image`, or `images` for the frames of one video (absolute paths, or relative to the file's
folder); `prompt`; `answer`, or `answers` where several are right; optionally `id`, `task`,
`choices`, `correct`, `context`, `ocr`, `split`. Blank lines are skipped; any other line that is no
such object is an error.
"""

import dataclasses
import difflib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from jax_instructblip import files
from jax_instructblip.fields import text_problem
from jax_instructblip.files import FileSlice

ImageSource = str | bytes | FileSlice | Image.Image

_FIELDS = (
    *("id", "image", "images", "prompt", "answer", "answers", "task", "choices", "correct"),
    *("context", "ocr", "split"),
)

# Field names that other programs use -> ours, for hints in errors.
_OTHERS = {
    **dict.fromkeys(("file_name", "filename", "image_path", "img", "picture"), ["image"]),
    **dict.fromkeys(("question", "instruction", "text_input", "input", "query"), ["prompt"]),
    **dict.fromkeys(("label", "output", "text_output", "response", "target"), ["answer"]),
    "caption": ["answer"],
    **dict.fromkeys(("options", "candidates"), ["choices"]),
    **dict.fromkeys(("question_id", "image_id", "uid"), ["id"]),
}
_SINGLE = ("id", "prompt", "task", "split", "context", "problem")  # fields that are one text


LIST = (
    "this is a JSON array, expected one object a line: `jq -c '.[]' OLD.json > NEW.jsonl` makes "
    "such a file"
)


class RecordError(ValueError):
    """One or more records cannot be used; `problems` lists every reason, one string each."""

    def __init__(self, summary: str, problems: list[str]):
        """Joins `summary` and all `problems` into the message, one a line."""
        super().__init__("\n  ".join([summary, *problems]))
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class Record:
    """One question about one image (or about the frames of one video), with its right answers.

    Attributes:
      id: names the record within its dataset.
      images: paths, members of tars, encoded bytes or PIL images; frames of a video in the order of
        time. Only a conversation may have none.
      prompt: the bare question, before an instruction template is put around it.
      answers: the right answers; where several annotators answered, one entry for each of them,
        equal ones repeated. Empty where no answer is known: such a record cannot be trained on.
      task: the dataset, or the kind of question.
      choices: the candidates of a multiple-choice question.
      split: the split of the dataset ("train", "val"); "" where the file names none.
      correct: index of the right one of `choices`; -1 where it is not known.
      context: a text that belongs to the question: a hint, a caption, the text of a meme.
      ocr: words that an OCR program read in the image, in its order.
      history: earlier rounds of a dialogue, each a question and its answer.
      times: seconds of each image from the start of its video; empty for still images.
      blank: number of annotators who left the answer blank; they have no entry in `answers`.
      problem: the reason why the original files have no usable record here; "" for a usable one.
    """

    id: str
    images: tuple[ImageSource, ...]
    prompt: str
    answers: tuple[str, ...]
    task: str = ""
    choices: tuple[str, ...] = ()
    split: str = ""
    correct: int = -1
    context: str = ""
    ocr: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    times: tuple[float, ...] = ()
    blank: int = 0
    problem: str = dataclasses.field(default="", repr=False)  # digests are of what is stored

    def __post_init__(self):
        problems = []
        for name in _SINGLE:
            if not isinstance(getattr(self, name), str):
                problems.append(f"{name} is {files.kind_of(getattr(self, name))}, expected text")
        for name in ("correct", "blank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                problems.append(f"{name} is {files.kind_of(value)}, expected a whole number")
        for name in ("images", "answers", "choices", "ocr", "history", "times"):
            if not isinstance(getattr(self, name), tuple):
                problems.append(f"{name} is {files.kind_of(getattr(self, name))}, expected a tuple")
        if not problems:
            problems += self._problems()
        if problems:
            raise RecordError(f"record {self.id!r} is not usable:", problems)

    def _problems(self) -> Iterator[str]:
        if not self.images and not self.prompt.strip():
            yield "images and prompt are empty, expected an image or a text"
        for index, image in enumerate(self.images):
            if not isinstance(image, ImageSource):
                kind = files.kind_of(image)
                yield f"images[{index}] is {kind}, expected a path, bytes or a PIL image"
            elif isinstance(image, str) and not image:
                yield f"images[{index}] is an empty path"
        for name in ("answers", "choices", "ocr"):
            for index, text in enumerate(getattr(self, name)):
                if not isinstance(text, str):
                    yield f"{name}[{index}] is {files.kind_of(text)}, expected text"
                elif not text.strip():
                    yield f"{name}[{index}] is empty"
        if not -1 <= self.correct < len(self.choices):
            count = len(self.choices)
            yield f"correct is {self.correct}, expected the index of one of {count} choices, or -1"
        if self.blank < 0:
            yield f"blank is {self.blank}, expected 0 or more"
        for index, turn in enumerate(self.history):
            if len(turn) != 2 or not all(isinstance(text, str) for text in turn):
                yield f"history[{index}] is {turn!r}, expected a question and its answer"
        if self.times and len(self.times) != len(self.images):
            yield f"times has {len(self.times)} numbers for {len(self.images)} images"

    def text_problems(self) -> list[str]:
        """Returns `problem` and a complaint for each bad text (too long, no UTF-8) or path.

        Such a record can be made, so that it can be counted, but it can neither be trained on nor
        answered.
        """
        named = [(name, getattr(self, name)) for name in _SINGLE]
        for name in ("answers", "choices", "ocr"):
            named += [(f"{name}[{i}]", text) for i, text in enumerate(getattr(self, name))]
        for index, turn in enumerate(self.history):
            named += [(f"history[{index}]", text) for text in turn]
        problems = [(name, text_problem(text)) for name, text in named]
        reasons = [self.problem] if self.problem else []
        for index, image in enumerate(self.images):
            try:
                # os.fsencode takes the lone surrogates in names of other encodings.
                os.fsencode(image if isinstance(image, str) else "")
            except UnicodeEncodeError:
                problems.append((f"images[{index}]", f"cannot be the name of a file: {image!r}"))
        return reasons + [f"{name} {problem}" for name, problem in problems if problem]


def read_jsonl(
    path: str | os.PathLike[str], *, need_answers: bool = True, need_prompt: bool = True
) -> list[Record]:
    """Returns the records of a JSON-lines file, in its order; image paths include its folder.

    A line without `id` gets the id `NAME:LINE`, NAME being the file's name without its ending. A
    line without a prompt is an error unless `need_prompt` is False (a model trained with empty
    prompts would answer unasked); so is one without an answer unless `need_answers` is False.
    Images must exist, but are not opened. A line whose text cannot be used (`Record.text_problems`)
    is no error here: like a damaged image, training replaces it and an evaluation counts it as
    wrong.

    Raises:
        RecordError: the file has no records, or bad lines, all listed as `FILE:LINE: reason`.
    """
    records, problems = [], []
    for line, record, reasons in scan_jsonl(
        path, need_answers=need_answers, need_prompt=need_prompt
    ):
        if record is not None:
            records.append(record)
        problems += [f"{path}:{line}: {reason}" for reason in reasons]
    check_lines(path, len(records), problems)
    return records


def check_lines(path: str | os.PathLike[str], good: int, problems: Sequence[str]) -> None:
    """Raises a RecordError if a file has bad lines, or no good one.

    `good` is the number of good lines; `problems` are of the form `FILE:LINE: reason`.
    """
    if problems:
        lines = len({problem.split(": ", 1)[0] for problem in problems})
        raise RecordError(
            f"{path}: {lines} bad line{'s' * (lines > 1)} beside {good} good; nothing was "
            "read. Correct or delete these:",
            list(problems),
        )
    if not good:
        raise RecordError(
            f"{path} holds no records:",
            ["the file is empty, expected one JSON object a line with image, prompt and answer"],
        )


def scan_jsonl(
    path: str | os.PathLike[str],
    *,
    need_answers: bool = True,
    need_prompt: bool = True,
    extra: Sequence[str] = (),
) -> Iterator[tuple[int, Record | None, list[str]]]:
    """Yields `(line number, record, reasons)` of each line; arguments are those of `read_jsonl`.

    A good line has a record and no reasons; a bad line has None as its record, and the reasons why
    it cannot be used. Lines may also have the fields `extra`, which are not read here.
    """
    path = pathlib.Path(path)
    first_use: dict[str, int] = {}
    for number, fields, reason in files.scan_jsonl(path):
        if not reason and not isinstance(fields, dict):
            reason = f"found {files.kind_of(fields)}, expected an object {{...}}"
        if reason:
            if number == 1 and _begins_a_list(path):
                yield number, None, [LIST]
                return
            yield number, None, [reason]
            continue
        record, reasons = _record(path, number, fields, need_answers, need_prompt, extra)
        if record is not None:
            before = first_use.setdefault(record.id, number)
            if before != number:
                record, reasons = None, [f"id {record.id!r} was used on line {before}"]
        yield number, record, reasons


def _begins_a_list(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return file.read(16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _record(
    path: pathlib.Path,
    number: int,
    fields: dict[str, Any],
    need_answers: bool,
    need_prompt: bool,
    extra: Sequence[str],
) -> tuple[Record | None, list[str]]:
    reasons, known = [], (*_FIELDS, *extra)
    for name in fields:
        if name not in known:
            near = _OTHERS.get(name) or difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            reasons.append(f"unknown field {name!r}; {hint}")
    if type(fields.get("id")) is int:
        fields = fields | {"id": str(fields["id"])}
    images = []
    for name in _texts(fields, "image", "images", reasons, needed=True):
        image = path.parent / name  # an absolute name stays what it is
        images.append(str(image))
        if not text_problem(name) and not image.is_file():
            why = "is a folder" if image.is_dir() else "does not exist"
            reasons.append(f"image {name!r} {why} (looked for {image})")
    record: dict[str, Any] = dict(
        id=_text(fields, "id", reasons) or f"{path.stem}:{number}",
        images=tuple(images),
        prompt=_text(fields, "prompt", reasons, needed=need_prompt),
        answers=_texts(fields, "answer", "answers", reasons, needed=need_answers),
        task=_text(fields, "task", reasons),
        choices=_texts(fields, None, "choices", reasons),
        split=_text(fields, "split", reasons),
        correct=fields.get("correct", -1),
        context=_text(fields, "context", reasons),
        ocr=_texts(fields, None, "ocr", reasons),
    )
    if reasons:
        return None, reasons
    try:
        return Record(**record), []
    except RecordError as error:
        return None, error.problems


def _text(fields: dict[str, Any], name: str, reasons: list[str], needed: bool = False) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        reasons.append(f"{name} is {files.kind_of(value)}, expected text")
        return ""
    if needed and not value.strip():
        reasons.append(f"{name} is {'empty' if name in fields else 'missing'}")
    return value


class RecordSubset(Sequence[Record]):
    """The records with the given numbers, in that order, read when they are asked for."""

    def __init__(self, records: Sequence[Record], numbers: Any):
        """Takes `numbers` [n], a sequence or an array of indices into `records`."""
        self._records, self._numbers = records, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return self._records[int(self._numbers[index])]


def _texts(
    fields: dict[str, Any], one: str | None, many: str, reasons: list[str], needed: bool = False
) -> tuple[str, ...]:
    """Returns the texts of field `one` (a single text) or of field `many` (a list of them).

    Blank texts and values that are no text are left out; each adds a complaint to `reasons`.
    """
    if one in fields and many in fields:
        reasons.append(f"{one!r} and {many!r} are both given, expected one of them")
        return ()
    if one in fields:
        named = {one: fields[one]}
    elif isinstance(fields.get(many, []), list):
        named = {f"{many}[{i}]": value for i, value in enumerate(fields.get(many, []))}
    else:
        reasons.append(f"{many} is {files.kind_of(fields[many])}, expected a list of texts")
        return ()
    if needed and not named:
        reasons.append(f"{many} is an empty list" if many in fields else f"{one} is missing")
    for name, value in named.items():
        if not isinstance(value, str):
            reasons.append(f"{name} is {files.kind_of(value)}, expected text")
        elif not value.strip():
            reasons.append(f"{name} is empty")
    return tuple(value for value in named.values() if isinstance(value, str) and value.strip())
