"""A file of questions, each with settings of its own, for `generate --jsonl`.

    {"image": "1.jpg", "prompt": "What is on the table?"}
    {"image": "1.jpg", "prompt": "Tell a story.", "temperature": 0.8, "seed": 7, "id": "story"}

Fields are those of a record (`data/records.py`; answers are not needed) and the decoding settings
`SETTINGS`, which go before those of the command. A line with a seed is drawn as if it were asked
alone. All others are drawn as one call of `generate` with all lines would: by the common seed and
the line's position, so that a repeated question gets several answers.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax_instructblip import files
from jax_instructblip.data.records import Record, check_lines, scan_jsonl
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.evaluation.grouping import padded_shape
from jax_instructblip.inference.batching import (
    Example,
    Question,
    check_reserve,
    warn_of_unread,
)
from jax_instructblip.inference.generation_config import GenerationConfig

SETTINGS = (
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "seed"),
    "repetition_penalty",
)

UNREAD = ("choices", "context", "ocr")  # fields of a record that templates would put in a prompt


class Line(NamedTuple):
    """One question of a file.

    Attributes:
      number: its line in the file, from 1.
      record: images and prompt.
      config: its settings.
      row: what its draws depend on beside the seed: its position among the lines, 0 for a line
        with a seed of its own.
    """

    number: int
    record: Record
    config: GenerationConfig
    row: int


def read_questions(path: str | os.PathLike[str], config: GenerationConfig) -> list[Line]:
    """Reads the questions of a file; `config` holds the settings that a line does not name.

    Images must exist, but are not opened.

    Raises:
      RecordError: the file has no questions, or bad lines; all are listed as `FILE:LINE: reason`.
    """
    settings = {number: _settings(fields) for number, fields, _ in files.scan_jsonl(path)}
    lines, problems = [], []
    for number, record, reasons in scan_jsonl(path, need_answers=False, extra=SETTINGS):
        own = settings.get(number, {})
        try:
            asked = config.replace(**own)
        except ValueError as error:
            reasons, asked = [*reasons, str(error)], config
        reasons += record.text_problems() if record else []
        if record is not None and not reasons:
            lines.append(Line(number, record, asked, 0 if "seed" in own else len(lines)))
        problems += [f"{path}:{number}: {reason}" for reason in reasons]
    check_lines(path, len(lines), problems)
    if unread := [line for line in lines if any(getattr(line.record, name) for name in UNREAD)]:
        logging.getLogger(__name__).warning(
            "%d of %d lines have %s, which is not part of what is asked (line %d, for one): write "
            "it in the prompt",
            *(len(unread), len(lines), " or ".join(UNREAD), unread[0].number),
        )
    return lines


def read_prompts(
    path: str | os.PathLike[str], lines: Sequence[Line], text: TextProcessor
) -> tuple[list[Example], int]:
    """Returns the tokens of each line's prompt, and the slots of the longest padded row.

    Slots count visual vectors and padded prompt, without the answer. `path` is named in errors.

    Raises:
      RecordError: lists all lines whose prompt is too long or cannot be used.
    """
    prompt: Any = text.prompt  # that of a chat takes conversations, too
    examples, problems, width = [], [], 0
    for line in lines:
        images, reserve = len(line.record.images), line.config.max_new_tokens
        try:
            check_reserve(text.variant, images, reserve)
            examples.append(prompt(line.record.prompt, images))
            _, length = padded_shape(text, examples[-1], images, reserve)
            width = max(width, images * text.variant.visual_tokens + length)
        except ValueError as error:
            problems.append(f"{path}:{line.number}: {error}")
    check_lines(path, len(lines) - len(problems), problems)
    warn_of_unread(text, [Question((), line.record.prompt) for line in lines], examples)
    return examples, width


def _settings(fields: Any) -> dict[str, Any]:
    """The decoding settings among the fields of a line."""
    if not isinstance(fields, dict):
        return {}
    return {name: fields[name] for name in SETTINGS if name in fields}
