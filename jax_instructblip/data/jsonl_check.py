"""Checks a file of samples as training would read it: bad lines, and token counts of good ones."""

import collections
import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from jax_instructblip import stores
from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.conversation import Conversation, ConversationProcessor
from jax_instructblip.data.images import ImageError, decode
from jax_instructblip.data.inspect import (
    Pieces,
    caption_rows,
    histogram,
    render,
    token_counts,
    token_rows,
    turn_rows,
)
from jax_instructblip.data.llava_json import holds_conversations, scan_llava_json
from jax_instructblip.data.pairs import pair_problems
from jax_instructblip.data.records import Record, scan_jsonl
from jax_instructblip.data.text import TRUNCATED, TextProcessor
from jax_instructblip.progress import Progress

_SHOWN = 3  # examples listed of each problem
_WORKERS = min(8, os.cpu_count() or 1)  # Pillow decodes outside of Python's lock


@dataclasses.dataclass
class Findings:
    """The result of a check: bad lines with reasons, and token counts of the good lines.

    Attributes:
      bad: line number -> the reasons why the line cannot be used.
      good: number of good lines.
      lengths: what is counted, such as "answer" -> the number of tokens in each sample; a record
        gives one sample per answer.
      cut: `[3]`, the numbers of samples whose instruction, whose prompt and whose answer
        (`TRUNCATED`) lost tokens.
      unknown: "instruction", "prompt" or "answer" -> (line number, text) of each sample whose text
        has characters that the tokenizer does not know.
      samples: the first good lines: line number, record, and the token sequences of its first
        sample by their titles.
      unit: what is a sample, "answer", "conversation" or "caption".
    """

    bad: dict[int, list[str]]
    good: int
    lengths: dict[str, list[int]]
    cut: np.ndarray  # [3]
    unknown: dict[str, list[tuple[int, str]]]
    samples: list[tuple[int, Record, Mapping[str, Pieces]]]
    unit: str = "answer"

    @property
    def usable(self) -> bool:
        """Tells whether the file can be trained on: at least one line is good and none is bad."""
        return self.good > 0 and not self.bad


def examine(
    file: str | os.PathLike,
    text: TextProcessor | CaptionTokenizer,
    samples: int,
    chat: ConversationProcessor | None = None,
    images: str | os.PathLike | None = None,
) -> Findings:
    """Returns the findings about a file: reads all lines, opens all images, tokenizes all answers.

    `samples` is the number of good lines that are kept in `Findings.samples`. With `chat` each line
    is a conversation, and the file may be of LLaVA's layout, whose rows then count as lines; its
    images may lie in the folder `images` in place of its own. With a `CaptionTokenizer`, that of
    BLIP-2's first stage, each line is an image and its captions.

    Raises:
        ValueError: the file has conversations, but there is no `chat`; or it has none, but
            `images` is given.
    """
    path = stores.input_rows(file)
    talks = holds_conversations(path)
    captions = isinstance(text, CaptionTokenizer)
    if talks and captions:
        raise ValueError(
            f"{file} has whole conversations, but the checkpoint is a first stage of BLIP-2, which "
            "is trained on images and captions: expected one of each a line"
        )
    if talks and chat is None:
        raise ValueError(
            f"{file} has whole conversations: name the chat template that writes them (--template)"
        )
    if images is not None and not talks:
        raise ValueError(
            f"{file} has no conversations: the images of its lines are found beside it; leave out "
            "--images"
        )
    lines = functools.partial(scan_jsonl, need_prompt=not captions)
    scan = functools.partial(scan_llava_json, images=images) if talks else lines
    cut, unknown = np.zeros(len(TRUNCATED), np.int64), {name: [] for name in TRUNCATED}
    findings = Findings({}, 0, collections.defaultdict(list), cut, unknown, [])
    findings.unit = "caption" if captions else "answer" if chat is None else "conversation"
    records: dict[int, Record] = {}
    with Progress(None, "reading", "lines") as progress:
        for line, record, reasons in scan(path):
            progress.update()
            if record is None:
                findings.bad[line] = reasons
            else:
                records[line] = record
    unreadable = open_images(str(path) for record in records.values() for path in record.images)
    with Progress(len(records), "counting tokens", "lines") as progress:
        for line, record in records.items():
            progress.update()
            reasons = pair_problems(record) if captions else record.text_problems()
            reasons += [unreadable[path] for path in map(str, record.images) if path in unreadable]
            samples_of_line = [] if reasons else list(_samples(record, text, chat))
            examples = []
            for _, _, tokenize in samples_of_line:
                try:
                    examples.append(tokenize())
                except ValueError as error:
                    reasons.append(str(error))
            if reasons:
                findings.bad[line] = list(dict.fromkeys(reasons))
                continue
            findings.good += 1
            for prompt, answer, _ in samples_of_line:
                for name, value in _unknown(text, prompt, answer, chat is None):
                    findings.unknown[name].append((line, value))
            for example in examples:
                findings.cut += example["truncated"]
                for name, count in token_counts(example).items():
                    findings.lengths[name].append(count)
            if len(findings.samples) < samples:
                if isinstance(text, CaptionTokenizer):
                    rows = caption_rows(examples[0], text)
                elif chat is None:
                    rows = token_rows(examples[0], text)
                else:
                    talk = Conversation.from_record(record)
                    rows = turn_rows(talk, chat, len(examples[0]["tokens"]))
                findings.samples.append((line, record, rows))
    return findings


def _unknown(
    text: TextProcessor | CaptionTokenizer, prompt: str, answer: str, plain: bool
) -> Iterator[tuple[str, str]]:
    """Yields (one of `TRUNCATED`, text) of the texts of a sample with unknown characters.

    `plain` is False for a conversation, which the Q-Former does not read.
    """
    if isinstance(text, CaptionTokenizer):
        if text.has_unknown(answer):
            yield "answer", answer
        return
    read = TRUNCATED[:2] if text.variant.reads_instruction and plain else TRUNCATED[1:2]
    for name, value in (dict.fromkeys(read, prompt) | {"answer": answer}).items():
        if text.has_unknown(name, value):
            yield name, value


def _samples(
    record: Record, text: TextProcessor | CaptionTokenizer, chat: ConversationProcessor | None
) -> Iterator[tuple[str, str, Callable[[], Mapping[str, np.ndarray]]]]:
    """Yields (prompt, answer, function that returns the example) of each sample of a record."""
    if isinstance(text, CaptionTokenizer):
        for caption in dict.fromkeys(record.answers):
            yield "", caption, functools.partial(text.example, caption)
        return
    if chat is None:
        for answer in record.answers:
            yield record.prompt, answer, functools.partial(text.example, record.prompt, answer)
        return
    talk = Conversation.from_record(record)
    questions, answers = (" ".join(turn.text for turn in talk.turns[k::2]) for k in (0, 1))
    yield questions, answers, functools.partial(chat.example, talk)


def describe(file: pathlib.Path, findings: Findings) -> Iterator[str]:
    """Yields the lines of the report about `findings`, those of the file `file`."""
    samples = f"; each {findings.unit} is a sample" if findings.good else ""
    yield f"{file}: {findings.good} good lines, {len(findings.bad)} bad{samples}"
    yield from _bad_lines(file, findings.bad)
    if not findings.bad and not findings.good:
        yield f"  {file} holds no records, expected one JSON object a line"
    for name, counts in findings.lengths.items():
        yield from ("", *histogram(name, counts))
    samples = len(next(iter(findings.lengths.values()), []))
    for name, count in zip(TRUNCATED, findings.cut.tolist(), strict=True):
        if count:
            yield f"{count} of {samples} samples lose tokens of their {name} to its limit"
    for name, where in findings.unknown.items():
        if where:
            whose = "the language model's"
            if name == "instruction" or findings.unit == "caption":
                whose = "the Q-Former's"
            yield (
                f"{len(where)} of {samples} samples have characters in their {name} that {whose} "
                "tokenizer does not know: they all become one and the same <unk>"
            )
            yield from (f"  {file}:{line}: {value[:60]!r}" for line, value in where[:_SHOWN])
            if len(where) > _SHOWN:
                yield f"  and {len(where) - _SHOWN} more"
    if findings.samples:
        yield "\nsamples, the loss asks for the tokens in [brackets]:"
    for line, record, rows in findings.samples:
        yield f"  {file.name}:{line}  {', '.join(map(str, record.images))}"
        for name, pieces in rows.items():
            yield f"    {name:<14}  {render(pieces)}"


def _bad_lines(file: pathlib.Path, bad: Mapping[int, list[str]]) -> Iterator[str]:
    """Yields each bad line with its reasons; of many with one reason, only the first few.

    For the others of that reason one line tells their number.
    """
    causes = collections.defaultdict(list)
    for line in sorted(bad):
        for reason in bad[line]:
            cause = re.sub(r"'[^']*'|\([^)]*\)|\d+", "", reason)
            causes[cause].append(f"  {file}:{line}: {reason}")
    for messages in causes.values():
        if len(messages) <= 2 * _SHOWN:
            yield from messages
        else:
            yield from messages[:_SHOWN]
            yield f"  and {len(messages) - _SHOWN:,} more lines of this kind"


def open_images(paths: Iterable[str]) -> dict[str, str]:
    """Decodes each image file once; returns path -> reason for those that cannot be used."""
    unique = list(dict.fromkeys(paths))

    def reason(path: str) -> str | None:
        try:
            decode(path)
        except ImageError as error:
            return str(error)
        return None

    reasons = {}
    with (
        Progress(len(unique), "opening images", "images") as progress,
        concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool,
    ):
        for path, why in zip(unique, pool.map(reason, unique), strict=True):
            progress.update()
            if why is not None:
                reasons[path] = why
    return reasons
