"""An HTML page of training samples: images, texts as tokens, loss targets, length histograms."""

import collections
import html
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jax_instructblip.data.inspect import Pieces, histogram, token_counts, token_rows
from jax_instructblip.data.mixture import Mixture, Source
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.records import Record
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.evaluation.reports import page
from jax_instructblip.progress import Progress

SAMPLES = 1000  # records drawn for a preview, which the length histograms are of


def preview(
    path: str | os.PathLike,
    dataset: Dataset,
    raw: pathlib.Path,
    text: TextProcessor,
    splits: Sequence[str] = (),
) -> None:
    """Writes a page about `SAMPLES` random records of one split of a dataset to the file `path`.

    `raw` is the folder of the dataset's original files, `text` the tokenizers of a model. The split
    is the first of `splits`; by default the first whose files are in `raw`.

    Raises:
      ValueError: the split has no record.
    """
    split = [*splits, *dataset.present(raw), *dataset.files][0]
    with Progress(dataset.counts.get(split), f"reading {dataset.name} {split}", "records") as line:
        drawn = draw(_counted(dataset.read(raw, split), line), SAMPLES)
    if not drawn:
        raise ValueError(f"{raw}: {dataset.name} has no record of the split {split!r}")
    source = Source(f"{dataset.name} {split}", drawn, "", templates=dataset.templates)
    write_preview(path, source, text)


def _counted(records: Iterable[Record], line: Progress) -> Iterator[Record]:
    for record in records:
        yield record
        line.update()


def draw(records: Iterable[Record], count: int, seed: int = 0) -> list[Record]:
    """Returns `count` random records (all if there are fewer) in order, reading `records` once."""
    rng, kept = np.random.default_rng(seed), []
    for number, record in enumerate(records):
        if len(kept) < count:
            kept.append((number, record))
        elif (slot := int(rng.integers(number + 1))) < count:
            kept[slot] = (number, record)
    return [record for _, record in sorted(kept, key=lambda pair: pair[0])]


def write_preview(
    path: str | os.PathLike, source: Source, text: TextProcessor, *, shown: int = 20, seed: int = 0
) -> None:
    """Writes a page with `shown` records of a source as pictures, and histograms of text lengths.

    The histograms are of all records of the source. `text` has the tokenizers of a model, and
    `seed` determines which templates word the prompts.
    """
    mixture, cards = Mixture([source], seed), []
    lengths: dict[str, list[int]] = collections.defaultdict(list)
    for number, record in enumerate(source.records):
        try:
            instruction = mixture.instruct(source, record, mixture.rng(number, 0, use="text"))
            example = text.example(*instruction)
        except ValueError as error:
            cards.append(_card(record, {"cannot be used": [(str(error), False)]}, {}))
            continue
        counts = token_counts(example)
        for name, value in counts.items():
            lengths[name].append(value)
        cards.append(_card(record, token_rows(example, text), counts))
    chart = [line for name, counts in lengths.items() for line in [*histogram(name, counts), ""]]
    parts = [
        page.note("Marked tokens are those that the loss asks for."),
        page.grid(cards[:shown]),
        page.heading(f"Lengths of {len(cards)} samples"),
        f"<pre>{html.escape(chr(10).join(chart))}</pre>",
    ]
    page.write(path, source.name, parts)


def _card(record: Record, rows: Mapping[str, Pieces], counts: Mapping[str, int]) -> str:
    numbers = ", ".join(f"{name}: {count}" for name, count in counts.items())
    lines = [page.marked(name, pieces) for name, pieces in rows.items()]
    return page.card(record.images, "", lines, [f"{record.id}; {numbers}"])
