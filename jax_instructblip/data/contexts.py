"""Captions and boxes, which describe an image to a language model that sees none.

    A red fire hydrant is deep in the snow.
    This city has had a very hard winter.

    fire hydrant: [0.326, 0.612, 0.426, 0.72]

A box is x1, y1, x2, y2 from the top left corner, in parts of the width and height. Files of
contexts are JSON lines in LLaVA's layout:

    {"id": "1", "image": "1.jpg", "captions": ["..."],
     "instances": [{"category": "fire hydrant", "bbox": [0.326, 0.612, 0.426, 0.72]}]}
"""

import dataclasses
import os
import re
from typing import Any, NamedTuple

from jax_instructblip import files, stores
from jax_instructblip.data.records import RecordError
from jax_instructblip.fields import text_problem

DIGITS = 3  # of a coordinate after the point
_LINE = re.compile(r"(?P<name>\S.*): \[(?P<numbers>[^\[\]]*)\]")
_EXPECTED = "expected 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1 (parts of width and height)"


class Box(NamedTuple):
    """An object in an image: its name and corners x1, y1, x2, y2, each from 0 to 1."""

    name: str
    corners: tuple[float, float, float, float]

    def __str__(self) -> str:
        """Returns `NAME: [x1, y1, x2, y2]`, the numbers with up to three digits."""
        return f"{self.name}: {[round(float(each), DIGITS) for each in self.corners]}"


@dataclasses.dataclass(frozen=True)
class Context:
    """The description of one image.

    Attributes:
      id: the name of the image.
      image: the path of its file, as the file of contexts gives it; "" where there is none.
      captions: one or more captions.
      boxes: the boxes of its objects, in the file's order; may be empty.
    """

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()

    def text(self, *, boxes: bool = True) -> str:
        """Returns the captions, one a line, and after an empty line the boxes if there are any.

        Empty lines in captions are left out, because what follows an empty line is read as boxes.
        """
        lines = [line for caption in self.captions for line in caption.splitlines()]
        parts = ["\n".join(filter(str.strip, lines))]
        if boxes and self.boxes:
            parts.append("\n".join(map(str, self.boxes)))
        return "\n\n".join(parts)


def parse_context(text: str, name: str) -> Context:
    """Returns the context that `Context.text` wrote as `text`; `name` becomes its id.

    Raises:
      RecordError: lists every line that is wrong as `NAME:LINE: reason`.
    """
    lines = text.rstrip("\n").split("\n")
    end = lines.index("") if "" in lines else len(lines)
    problems, boxes = [], []
    for number, line in enumerate(lines[:end], start=1):
        if not line.strip():
            problems.append(f"{name}:{number}: a caption is blank")
    for number, line in enumerate(lines[end + 1 :], start=end + 2):
        try:
            boxes.append(_parse_box(line))
        except ValueError as error:
            problems.append(f"{name}:{number}: {error}")
    if end == 0:
        problems.append(f"{name}:1: expected a caption")
    if problems:
        raise RecordError(f"{name} holds no captions and boxes:", problems)
    return Context(name, "", tuple(lines[:end]), tuple(boxes))


def read_contexts(path: str | os.PathLike[str], *, need_image: bool = True) -> list[Context]:
    """Returns the contexts of a file of JSON lines, in its order.

    Instead of `captions` a line may have `caption`, a text or a list of texts. Other fields are
    ignored. A whole number as `id` becomes text; a line without one takes its `image`. A line
    without `image` is a bad one, unless `need_image` is False.

    Raises:
      RecordError: the file is empty, or has bad lines, all listed as `FILE:LINE: reason`.
    """
    path = stores.input_path(path, "the file of contexts")
    contexts: dict[str, Context] = {}
    problems = []
    for number, fields, reason in files.scan_jsonl(path):
        try:
            if reason:
                raise RecordError("", [reason])
            context = _context(fields, need_image)
            if context.id in contexts:
                raise RecordError("", [f"id {context.id!r} was used before"])
            contexts[context.id] = context
        except RecordError as error:
            problems += [f"{path}:{number}: {each}" for each in error.problems]
    if problems:
        raise RecordError(
            f"{path}: {len(problems)} problems beside {len(contexts)} good lines; nothing was "
            "asked. Correct or delete these:",
            problems,
        )
    if not contexts:
        raise RecordError(f"{path} holds no contexts:", ["it is empty"])
    return list(contexts.values())


def _context(fields: Any, need_image: bool) -> Context:
    """Returns the context of one line; raises a RecordError with all that is wrong."""
    if not isinstance(fields, dict):
        raise RecordError("", [f"found {files.kind_of(fields)}, expected an object {{...}}"])
    problems: list[str] = []
    image = fields.get("image", "")
    if not isinstance(image, str) or text_problem(image):
        problems.append(f"image is {files.kind_of(image)}, expected the path of an image")
    elif need_image and not image.strip():
        problems.append(f"image is {'empty' if 'image' in fields else 'missing'}")
    name = fields.get("id", image)
    if not isinstance(name, str | int) or isinstance(name, bool) or not str(name).strip():
        problems.append(f"id is {files.kind_of(name)}, expected text or a whole number")
    captions = _captions(fields, problems)
    instances = fields.get("instances", [])
    boxes = []
    if not isinstance(instances, list):
        problems.append(f"instances is {files.kind_of(instances)}, expected a list")
        instances = []
    for index, instance in enumerate(instances):
        try:
            boxes.append(_instance(instance))
        except ValueError as error:
            problems.append(f"instances[{index}]: {error}")
    if problems:
        raise RecordError("", problems)
    return Context(str(name), image, captions, tuple(boxes))


def _captions(fields: dict[str, Any], problems: list[str]) -> tuple[str, ...]:
    """Returns the texts of `captions` or `caption`; adds a problem for each that is none."""
    given = [name for name in ("captions", "caption") if name in fields]
    if len(given) != 1:
        problems.append("captions is missing" if not given else "captions and caption are given")
        return ()
    value = fields[given[0]]
    texts = [value] if isinstance(value, str) and given == ["caption"] else value
    if not isinstance(texts, list) or not texts:
        found = "an empty list" if texts == [] else files.kind_of(texts)
        problems.append(f"{given[0]} is {found}, expected a list of texts")
        return ()
    for index, each in enumerate(texts):
        if not isinstance(each, str):
            problems.append(f"{given[0]}[{index}] is {files.kind_of(each)}, expected text")
        elif problem := "is blank" if not each.strip() else text_problem(each):
            problems.append(f"{given[0]}[{index}] {problem}")
    return tuple(texts)


def _instance(instance: Any) -> Box:
    """Returns the box of an entry of `instances`; a ValueError says what is wrong."""
    if not isinstance(instance, dict):
        raise ValueError(f"found {files.kind_of(instance)}, expected an object {{...}}")
    name, corners = instance.get("category"), instance.get("bbox")
    if not isinstance(name, str) or not name.strip() or "\n" in name or text_problem(name):
        raise ValueError(f"category is {files.kind_of(name)}, expected the name of an object")
    if not isinstance(corners, list) or any(type(each) not in (int, float) for each in corners):
        raise ValueError(f"bbox is {files.kind_of(corners)}, expected four numbers")
    return _box(name, corners)


def _parse_box(line: str) -> Box:
    """Returns the box of one line of text; a ValueError says what is wrong."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"found {line[:60]!r}, expected `name: [x1, y1, x2, y2]`")
    try:
        return _box(match["name"], [float(each) for each in match["numbers"].split(",")])
    except ValueError as error:
        raise ValueError(f"{line[:60]!r}: {error}") from error


def _box(name: str, corners: list[float]) -> Box:
    if len(corners) != 4:
        raise ValueError(f"{name} has {len(corners)} coordinates, expected x1, y1, x2, y2")
    x1, y1, x2, y2 = corners
    if not (0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1):
        raise ValueError(f"the box of {name} is {corners}, {_EXPECTED}")
    return Box(name, (x1, y1, x2, y2))
