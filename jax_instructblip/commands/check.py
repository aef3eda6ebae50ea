"""Reads a file of your own data as training would, and reports every bad line.

Opens every image, counts tokens, and shows a few samples with the tokens that the loss asks for
in [brackets]. Exit code 1 if any line is bad.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jax_instructblip.data.batch import IGNORE
from jax_instructblip.data.images import ImageError, decode
from jax_instructblip.data.progress import Progress
from jax_instructblip.data.records import Record, scan_jsonl
from jax_instructblip.data.text import TRUNCATED, TextProcessor
from jax_instructblip.inference.source import read_source
from jax_instructblip.models.variants import T5Config

_BAR = 40  # characters of the longest bar
Pieces = list[tuple[str, bool]]

_WORKERS = min(8, os.cpu_count() or 1)  # Pillow decodes outside of Python's lock


def main(argv: list[str]) -> int:
    """Prints the report; 1 if a line is bad, else 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip check", description=__doc__)
    parser.add_argument("file", type=pathlib.Path, help="JSON lines: image(s), prompt, answer(s)")
    parser.add_argument(
        "--checkpoint",
        default="shapes_t5",
        help="whose tokenizers count: a folder, a run or an embedded name (default: %(default)s)",
    )
    parser.add_argument("--samples", type=int, default=5, help="how many to show (default: 5)")
    flags = parser.parse_args(argv)
    source = read_source(flags.checkpoint)
    text = TextProcessor.load(source.folder, source.variant, **source.limits)
    found = examine(flags.file, text, flags.samples)
    for line in describe(flags.file, found, text):
        print(line)
    return int(bool(found.bad) or not found.good)


@dataclasses.dataclass
class Findings:
    """What a file holds: reasons by line number, token counts of good lines, the first of them."""

    bad: dict[int, list[str]]
    good: int
    lengths: dict[str, list[int]]
    cut: np.ndarray  # [3], how many samples lost tokens of each of TRUNCATED
    samples: list[tuple[int, Record, Mapping[str, np.ndarray]]]


def examine(file: pathlib.Path, text: TextProcessor, samples: int) -> Findings:
    """Reads every line, opens every image and counts the tokens of every answer."""
    found = Findings({}, 0, collections.defaultdict(list), np.zeros(len(TRUNCATED), np.int64), [])
    records: dict[int, Record] = {}
    with Progress(None, "reading", "lines") as progress:
        for line, record, reasons in scan_jsonl(file):
            progress.update()
            if record is None:
                found.bad[line] = reasons
            else:
                records[line] = record
    unreadable = open_images(str(path) for record in records.values() for path in record.images)
    with Progress(len(records), "counting tokens", "lines") as progress:
        for line, record in records.items():
            progress.update()
            reasons = [unreadable[path] for path in map(str, record.images) if path in unreadable]
            examples = []
            for answer in record.answers:
                try:
                    examples.append(text.example(record.prompt, answer))
                except ValueError as error:
                    reasons.append(str(error))
            if reasons:
                found.bad[line] = list(dict.fromkeys(reasons))
                continue
            found.good += 1
            for example in examples:
                found.cut += example["truncated"]
                for name, count in token_counts(example).items():
                    found.lengths[name].append(count)
            if len(found.samples) < samples:
                found.samples.append((line, record, examples[0]))
    return found


def describe(file: pathlib.Path, found: Findings, text: TextProcessor) -> Iterator[str]:
    """The lines of the report."""
    yield f"{file}: {found.good} good lines, {len(found.bad)} bad"
    for line in sorted(found.bad):
        yield from (f"  {file}:{line}: {reason}" for reason in found.bad[line])
    if not found.bad and not found.good:
        yield f"  {file} holds no records, expected one JSON object a line"
    for name, counts in found.lengths.items():
        yield from ("", *histogram(name, counts))
    samples = len(next(iter(found.lengths.values()), []))
    for name, count in zip(TRUNCATED, found.cut.tolist(), strict=True):
        if count:
            yield f"{count} of {samples} samples lose tokens of their {name} to its limit"
    if found.samples:
        yield "\nsamples, the loss asks for the tokens in [brackets]:"
    for line, record, example in found.samples:
        yield f"  {file.name}:{line}  {', '.join(map(str, record.images))}"
        for name, pieces in token_rows(example, text).items():
            yield f"    {name:<14}  {render(pieces)}"


def open_images(paths: Iterable[str]) -> dict[str, str]:
    """The reason for each of the image files that cannot be used; each is decoded once."""
    unique = list(dict.fromkeys(paths))

    def reason(path: str) -> str | None:
        try:
            decode(path)
        except ImageError as error:
            return str(error)
        return None

    found = {}
    with (
        Progress(len(unique), "opening images", "images") as progress,
        concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool,
    ):
        for path, why in zip(unique, pool.map(reason, unique), strict=True):
            progress.update()
            if why is not None:
                found[path] = why
    return found


def token_counts(example: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many tokens the Q-Former reads, the language model reads, and the loss asks for."""
    return {
        "instruction for the Q-Former": len(example["qformer_tokens"]),
        "tokens of the language model": len(example["tokens"]),
        "answer": int((example["targets"] != IGNORE).sum()),
    }


def histogram(name: str, counts: Sequence[int]) -> list[str]:
    """Lines of text: how many samples have up to 8, 16, 32 ... tokens."""
    lines = [f"{name}: {min(counts)} to {max(counts)} tokens, median {statistics.median(counts):g}"]
    # 1..8 -> 8, 9..16 -> 16: the padded lengths that a bucket would have.
    bins = collections.Counter(max(8, 1 << (count - 1).bit_length()) for count in counts)
    top = min(bins)
    while top <= max(bins):
        low = 1 if top == 8 else top // 2 + 1
        bar = "#" * -(-_BAR * bins[top] // max(bins.values()))
        lines.append(f"  {f'{low}-{top}':>9} {bins[top]:>8} {bar}".rstrip())
        top *= 2
    return lines


def token_rows(example: Mapping[str, np.ndarray], text: TextProcessor) -> dict[str, Pieces]:
    """The token rows of an example: pieces, each with whether the loss asks for it."""
    pieces = text.llm.convert_ids_to_tokens(example["tokens"].tolist())
    instruction = text.qformer.convert_ids_to_tokens(example["qformer_tokens"].tolist())
    rows = {"Q-Former reads": [(piece, False) for piece in instruction]}
    if isinstance(text.variant.llm, T5Config):
        answer = text.llm.convert_ids_to_tokens(example["targets"].tolist())
        rows["encoder reads"] = [(piece, False) for piece in pieces]
        rows["decoder writes"] = [(piece, True) for piece in answer]
    else:
        # A target stands on the token before the one that it asks for.
        asked = np.roll(example["targets"] != IGNORE, 1).tolist()
        rows["LLM reads"] = list(zip(pieces, asked, strict=True))
    return rows


def render(pieces: Pieces) -> str:
    """The pieces on one line, brackets around every run of them that the loss asks for."""
    runs = []
    for asked, run in itertools.groupby(pieces, key=lambda pair: pair[1]):
        words = " ".join(piece for piece, _ in run)
        runs.append(f"[{words}]" if asked else words)
    return " ".join(runs)
