r"""Reads the questions and answers that a language model wrote about an image.

    Question:
    What colour is the hydrant?
    ===
    Answer:
    It is red.

A conversation has several rounds (question and answer), with `===` between all parts; complex
reasoning has one. A detailed description is plain text: its question is drawn from a list. The
argument `kind` is a key of `KINDS` in `kinds.py`.
"""

import hashlib

from jax_instructblip.data.conversation import ASSISTANT, IMAGE, USER, Conversation, Turn
from jax_instructblip.data.readers.dialogue import LLAVA_DETAIL_QUESTIONS

DIVIDER = "==="
_PARTS = ("Question:", "Answer:")


def find_problem(kind: str, text: str) -> str:
    """Returns why `text`, the model's answer, is no usable conversation; "" if it is one."""
    try:
        rounds = parse_rounds(kind, text, "")
    except ValueError as error:
        return str(error)
    return "; ".join(Conversation("", tuple(turns(rounds)), 1).problems(answered=True))


def parse_rounds(kind: str, text: str, draw: str) -> list[tuple[str, str]]:
    """Returns the (question, answer) pairs in `text`, in its order.

    The question of a description depends on `draw` alone, a text such as `SEED:IMAGE`.

    Raises:
      ValueError: the text does not have the form of its kind.
    """
    if kind == "detail_description":
        answer = text.strip()
        if not answer:
            raise ValueError("the description is empty")
        if any(line.strip() == DIVIDER or line.startswith(_PARTS) for line in answer.split("\n")):
            raise ValueError("expected a description, found questions and answers")
        return [(_detail_question(draw), answer)]
    parts = _parts(text)
    rounds = list(zip(parts[::2], parts[1::2], strict=True))
    if kind == "complex_reasoning" and len(rounds) != 1:
        raise ValueError(f"found {len(rounds)} questions, expected one")
    return rounds


def turns(rounds: list[tuple[str, str]]) -> list[Turn]:
    """Returns the rounds as turns, the image before the first question."""
    said = []
    for index, (question, answer) in enumerate(rounds):
        mark = "" if index else f"{IMAGE}\n"
        said += [Turn(USER, mark + question), Turn(ASSISTANT, answer)]
    return said


def _parts(text: str) -> list[str]:
    """Returns question, answer, question ... without their headings."""
    blocks: list[list[str]] = [[]]
    for line in text.strip().split("\n"):
        if line.strip() == DIVIDER:
            blocks.append([])
        else:
            blocks[-1].append(line)
    if blocks[-1] == [] and len(blocks) > 1:
        blocks.pop()  # a divider after the last answer
    parts = []
    for index, block in enumerate(blocks):
        heading = _PARTS[index % 2]
        part = "\n".join(block).strip()
        if not part.startswith(heading):
            raise ValueError(f"part {index + 1} begins with {part[:40]!r}, expected {heading!r}")
        part = part.removeprefix(heading).strip()
        if not part:
            raise ValueError(f"part {index + 1} is empty")
        if any(line.startswith(_PARTS) for line in part.split("\n")):
            raise ValueError(f"part {index + 1} holds another heading; is a {DIVIDER} missing?")
        parts.append(part)
    if len(parts) % 2:
        raise ValueError(f"it ends with question {len(parts) // 2 + 1}, without an answer")
    return parts


def _detail_question(draw: str) -> str:
    questions = sorted(LLAVA_DETAIL_QUESTIONS)
    return questions[int(hashlib.sha256(draw.encode()).hexdigest(), 16) % len(questions)]
