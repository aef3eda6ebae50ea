"""Checks a JSON-lines file as training would read it: bad lines, and token counts of good ones."""

import collections
import concurrent.futures
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jax_instructblip import stores
from jax_instructblip.data.images import ImageError, decode
from jax_instructblip.data.inspect import histogram, render, token_counts, token_rows
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
      cut: number of samples whose instruction, prompt and answer (`TRUNCATED`) lost tokens.
      unknown: "instruction", "prompt" or "answer" -> (line number, text) of each sample whose text
        has characters that the tokenizer does not know.
      samples: the first good lines: line number, record and its first sample in tokens.
    """

    bad: dict[int, list[str]]
    good: int
    lengths: dict[str, list[int]]
    cut: np.ndarray  # [3]
    unknown: dict[str, list[tuple[int, str]]]
    samples: list[tuple[int, Record, Mapping[str, np.ndarray]]]

    @property
    def usable(self) -> bool:
        """Tells whether the file can be trained on: at least one line is good and none is bad."""
        return self.good > 0 and not self.bad


def examine(file: str | os.PathLike, text: TextProcessor, samples: int) -> Findings:
    """Returns the findings about a file: reads all lines, opens all images, tokenizes all answers.

    `samples` is the number of good lines that are kept in `Findings.samples`.
    """
    cut, unknown = np.zeros(len(TRUNCATED), np.int64), {name: [] for name in TRUNCATED}
    findings = Findings({}, 0, collections.defaultdict(list), cut, unknown, [])
    records: dict[int, Record] = {}
    with Progress(None, "reading", "lines") as progress:
        for line, record, reasons in scan_jsonl(stores.input_rows(file)):
            progress.update()
            if record is None:
                findings.bad[line] = reasons
            else:
                records[line] = record
    unreadable = open_images(str(path) for record in records.values() for path in record.images)
    with Progress(len(records), "counting tokens", "lines") as progress:
        for line, record in records.items():
            progress.update()
            reasons = record.text_problems()
            reasons += [unreadable[path] for path in map(str, record.images) if path in unreadable]
            examples = []
            for answer in record.answers if not reasons else ():
                try:
                    examples.append(text.example(record.prompt, answer))
                except ValueError as error:
                    reasons.append(str(error))
            if reasons:
                findings.bad[line] = list(dict.fromkeys(reasons))
                continue
            findings.good += 1
            read = TRUNCATED[:2] if text.variant.reads_instruction else TRUNCATED[1:2]
            asked = {name: text.has_unknown(name, record.prompt) for name in read}
            for answer in record.answers:
                lacking = asked | {"answer": text.has_unknown("answer", answer)}
                for name in filter(lacking.get, TRUNCATED):
                    shown = answer if name == "answer" else record.prompt
                    findings.unknown[name].append((line, shown))
            for example in examples:
                findings.cut += example["truncated"]
                for name, count in token_counts(example).items():
                    findings.lengths[name].append(count)
            if len(findings.samples) < samples:
                findings.samples.append((line, record, examples[0]))
    return findings


def describe(file: pathlib.Path, findings: Findings, text: TextProcessor) -> Iterator[str]:
    """Yields the lines of the report about `findings`."""
    answers = "; each answer is a sample" if findings.good else ""
    yield f"{file}: {findings.good} good lines, {len(findings.bad)} bad{answers}"
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
            whose = "the Q-Former's" if name == "instruction" else "the language model's"
            yield (
                f"{len(where)} of {samples} samples have characters in their {name} that {whose} "
                "tokenizer does not know: they all become one and the same <unk>"
            )
            yield from (f"  {file}:{line}: {value[:60]!r}" for line, value in where[:_SHOWN])
            if len(where) > _SHOWN:
                yield f"  and {len(where) - _SHOWN} more"
    if findings.samples:
        yield "\nsamples, the loss asks for the tokens in [brackets]:"
    for line, record, example in findings.samples:
        yield f"  {file.name}:{line}  {', '.join(map(str, record.images))}"
        for name, pieces in token_rows(example, text).items():
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
