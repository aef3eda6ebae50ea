"""A file of JSON lines, read as training would: what is wrong with bad lines, tokens of others."""

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

_SHOWN = 3  # samples with unknown characters
_WORKERS = min(8, os.cpu_count() or 1)  # Pillow decodes outside of Python's lock


@dataclasses.dataclass
class Findings:
    """Findings about a file: reasons by line number, tokens of good lines, the first of them."""

    bad: dict[int, list[str]]
    good: int
    lengths: dict[str, list[int]]
    cut: np.ndarray  # [3], how many samples lost tokens of each of TRUNCATED
    unknown: dict[str, list[tuple[int, str]]]  # lines and texts with unknown pieces, likewise
    samples: list[tuple[int, Record, Mapping[str, np.ndarray]]]

    @property
    def usable(self) -> bool:
        """Tells whether training would take the file: no line is bad, and there is one."""
        return self.good > 0 and not self.bad


def examine(file: str | os.PathLike, text: TextProcessor, samples: int) -> Findings:
    """Reads every line, opens every image and counts the tokens of every answer."""
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
    """The lines of the report."""
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
    """Each bad line with its reasons; of many lines with one cause the first, and their number."""
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
    """The reason for each of the image files that cannot be used; each is decoded once."""
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
