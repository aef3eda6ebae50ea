"""Dialogues about an image: Visual Dialog and the three parts of LLaVA-Instruct-150K.

Each answer is a record, with the id `IMAGE:ROUND` and the earlier rounds as its history. `raw` is
the folder of the original files; `split` is val or test of Visual Dialog, train of LLaVA.

Each part of LLaVA is read from its own file (`LLAVA_PARTS`) or that of all three, JSON lists of

    {"id", "image", "conversations": [{"from": "human" or "gpt", "value"}]}

The mark `<image>` in the text is removed. Images below `raw` are COCO's:
`train2017/000000033471.jpg`.
"""

import collections
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

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
from jax_instructblip.data.readers.dataset import Dataset, Reader
from jax_instructblip.data.readers.named_files import PICTURES, NamedFiles
from jax_instructblip.data.records import Record

VISDIAL = {split: (f"visdial_1.0_{split}.json",) for split in ("val", "test")}
LLAVA_PARTS = {
    "llava_conversation": "conversation_58k.json",
    "llava_detail": "detail_23k.json",
    "llava_reasoning": "complex_reasoning_77k.json",
}
LLAVA_WHOLE = {"train": ("llava_instruct_150k.json",)}

# The questions with which LLaVA asks for a description, with its own spelling errors.
LLAVA_DETAIL_QUESTIONS = frozenset(
    (
        "Analyze the image in a comprehensive and detailed manner.",
        "Can you describe the main features of this image for me?",
        "Can you elaborate on the elements of the picture provided?",
        "Describe the following image.",
        "Explain the visual content of the image in great detail.",
        "What are the key elements in this picture?",
        "What do you see happening in this image?",
        "What do you think is going on in this snapshot?",
        "What is this photo about'?",
        "What's happening in the scene?",
        "Write a detailed description of the given image.",
    )
)


def read_visual_dialog(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields Visual Dialog 1.0; each round has 100 candidates, the context is the image's caption.

        {"data": {"questions": [texts], "answers": [texts], "dialogs": [
            {"image_id", "caption", "dialog": [
                {"question", "answer", "answer_options", "gt_index"}]}]}}

    In a dialog, questions and answers are indices into the two lists. In test only the last round
    has candidates, and the right one is not public. Images below `raw`:
    `VisualDialog_val2018/VisualDialog_val2018_000000239030.jpg`.
    """
    _, (path,) = pick_layout(raw, split, VISDIAL)
    return unique(_visual_dialog(raw, split, path))


def read_llava_conversation(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields LLaVA's conversations, several rounds about each image."""
    return _llava(raw, split, "llava_conversation")


def read_llava_detail(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields LLaVA's detailed descriptions of images, one round each."""
    return _llava(raw, split, "llava_detail")


def read_llava_reasoning(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields LLaVA's complex reasoning about images, one round each."""
    return _llava(raw, split, "llava_reasoning")


def part_of(rounds: Sequence[tuple[str, str]]) -> str:
    """Returns the part of LLaVA-Instruct-150K that a dialogue belongs to, a key of `LLAVA_PARTS`.

    `rounds` are its questions and answers. Several rounds are a conversation. One round is a
    detailed description if its question is one of `LLAVA_DETAIL_QUESTIONS`, and complex reasoning
    otherwise.
    """
    if len(rounds) > 1:
        return "llava_conversation"
    return "llava_detail" if rounds[0][0] in LLAVA_DETAIL_QUESTIONS else "llava_reasoning"


def _visual_dialog(raw: pathlib.Path, split: str, path: pathlib.Path) -> Iterator[Record]:
    data = field(read_json(path, dict), "data", dict, str(path))
    pictures = NamedFiles(raw, PICTURES)
    questions, answers = (
        _texts(field(data, name, list, f"{path}: data"), f"{path}: {name}")
        for name in ("questions", "answers")
    )
    for number, dialog in enumerate(field(data, "dialogs", list, f"{path}: data")):
        where = f"{path}: dialogs[{number}]"
        image_id = field(require(dialog, dict, where), "image_id", int, where)
        name = f"VisualDialog_{split}2018"
        history: list[tuple[str, str]] = []
        for turn, row in enumerate(field(dialog, "dialog", list, where), start=1):
            spot = f"{where}: image {image_id}, round {turn}"
            question = _at(questions, require(row, dict, spot), "question", spot)
            answer = _at(answers, row, "answer", spot) if "answer" in row else ""
            if "answer_options" in row:
                choices, correct = _candidates(row, answers, answer, spot)
                yield Record(
                    id=f"{image_id}:{turn}",
                    images=(pictures.find(name, f"{name}_{image_id:012d}", usual=".jpg"),),
                    prompt=question,
                    answers=(answer,) if answer else (),
                    task="visual_dialog",
                    choices=choices,
                    split=split,
                    correct=correct,
                    context=text_of(dialog, "caption", where),
                    history=tuple(history),
                )
            history.append((question, answer))


def _candidates(
    row: dict[str, Any], answers: list[str], answer: str, where: str
) -> tuple[tuple[str, ...], int]:
    """Returns (candidate answers, index of the right one) of a round; -1 if it is not public."""
    options = field(row, "answer_options", list, where)
    choices = tuple(
        _at(answers, {"answer_options": option}, "answer_options", where) for option in options
    )
    if "gt_index" not in row:
        return choices, -1
    correct = field(row, "gt_index", int, where)
    if not 0 <= correct < len(choices):
        raise AnnotationError(f"{where}: gt_index is {correct}, expected 0 to {len(choices) - 1}")
    if answer and choices[correct] != answer:
        raise AnnotationError(
            f"{where}: gt_index {correct} is {choices[correct]!r}, but the answer is {answer!r}: "
            "the file is not whole, get it again"
        )
    return choices, correct


def _texts(values: list[Any], where: str) -> list[str]:
    """Returns the stripped texts; a blank one is an error, since annotations refer to indices."""
    rows = [{"text": value} for value in values]
    return [text_of(row, "text", f"{where}[{number}]") for number, row in enumerate(rows)]


def _at(texts: list[str], row: dict[str, Any], name: str, where: str) -> str:
    """Returns the text whose index in the list is `row[name]`."""
    number = field(row, name, int, where)
    if not 0 <= number < len(texts):
        raise AnnotationError(f"{where}: {name} is {number}, but the list has {len(texts)} texts")
    return texts[number]


def _llava(raw: pathlib.Path, split: str, task: str) -> Iterator[Record]:
    """Yields one part of LLaVA-Instruct-150K (`task`), from its own file or the file of all three.

        [{"id", "image", "conversations": [{"from": "human" or "gpt", "value"}]}]

    `<image>`, the mark of the image's place in the text, is removed. Images below `raw`:
    `train2017/000000033471.jpg` of COCO.
    """
    layout, (path,) = pick_layout(raw, split, {"train": (LLAVA_PARTS[task],)}, LLAVA_WHOLE)
    dialogues = _dialogues(path)
    if layout == 1:
        dialogues = (each for each in dialogues if part_of(each[2]) == task)
    return unique(_turns(raw, split, task, dialogues))


def _dialogues(path: pathlib.Path) -> Iterator[tuple[str, dict, list[tuple[str, str]]]]:
    """Yields (text for errors, row, rounds) of each dialogue; a round is (question, answer)."""
    for number, row in enumerate(read_json(path, list)):
        where = f"{path}: row {number}"
        said = field(require(row, dict, where), "conversations", list, where)
        if not said or len(said) % 2:
            raise AnnotationError(
                f"{where}: {len(said)} turns, expected a question and an answer in each round"
            )
        texts = []
        for index, turn in enumerate(said):
            spot = f"{where}: conversations[{index}]"
            speaker = field(require(turn, dict, spot), "from", str, spot)
            if speaker != ("gpt" if index % 2 else "human"):
                raise AnnotationError(f"{spot}: from is {speaker!r}: human and gpt take turns")
            value = field(turn, "value", str, spot).replace("<image>", "")
            texts.append(text_of({"value": value}, "value", spot))
        yield where, row, list(zip(texts[::2], texts[1::2], strict=True))


def _turns(
    raw: pathlib.Path,
    split: str,
    task: str,
    dialogues: Iterable[tuple[str, dict, list[tuple[str, str]]]],
) -> Iterator[Record]:
    uses: collections.Counter[str] = collections.Counter()
    for where, row, rounds in dialogues:
        name = text_of(row, "image", where)
        image = inside(raw, *((name,) if "/" in name else ("train2017", name)), where=where)
        # An id is that of the image, so a second dialogue about the image gets another one.
        row_id = str(field(row, "id", (int, str), where))
        uses[row_id] += 1
        if uses[row_id] > 1:
            row_id += f"#{uses[row_id]}"
        for turn, (question, answer) in enumerate(rounds, start=1):
            yield Record(
                id=f"{row_id}:{turn}",
                images=(image,),
                prompt=question,
                answers=(answer,),
                task=task,
                split=split,
                history=tuple(rounds[: turn - 1]),
            )


def _llava_dataset(name: str, read: Reader, notes: str) -> Dataset:
    return Dataset(
        name=name,
        family="LLaVA-Instruct-150K",
        held_in=True,
        read=read,
        files={"train": (LLAVA_PARTS[name],)},
        rerelease=LLAVA_WHOLE,
        counts={},
        templates="",
        licence="CC BY 4.0, and the terms of OpenAI (made by GPT-4); images: terms of Flickr",
        source="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K; images: COCO "
        "train2017, https://cocodataset.org/#download",
        notes="Images in train2017/. The other release is one file of all three parts, told apart "
        f"by their form (UNVERIFIED on the whole file: counts may differ a little). {notes}",
    )


DATASETS: tuple[Dataset, ...] = (
    Dataset(
        name="visual_dialog",
        family="visual conversational QA",
        held_in=False,
        read=read_visual_dialog,
        files=VISDIAL,
        counts={"val": 20_640},
        templates="question",
        licence="CC BY 4.0; images: terms of Flickr",
        source="https://visualdialog.org/data",
        notes="Images in VisualDialog_val2018/ and VisualDialog_test2018/. Scored on val: 2,064 "
        "images of ten rounds. The right answers of test are not public. UNVERIFIED: whether all "
        "ten rounds or the last alone were scored, and whether the caption (`context`) was in the "
        "prompt.",
    ),
    _llava_dataset("llava_conversation", read_llava_conversation, "Every answer is a record."),
    _llava_dataset("llava_detail", read_llava_detail, "About 23,000 records."),
    _llava_dataset("llava_reasoning", read_llava_reasoning, "About 77,000 records."),
)
