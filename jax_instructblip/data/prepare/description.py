"""A prepared dataset in words."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jax_instructblip.data.prepare.shards import read_report
from jax_instructblip.data.readers.dataset import Dataset


def describe(
    folder: pathlib.Path, dataset: Dataset, raw: pathlib.Path, title: str = ""
) -> Iterator[str]:
    """A prepared dataset for people: the counts of its splits beside the table's, what it lacks.

    `title` is what the folder is called instead of its path.
    """
    prepared = read_report(folder)["splits"]
    for name, split in prepared.items():
        yield f"{dataset.name} {name}: {_counts(split)}"
    if absent := [name for name in dataset.files if name not in prepared]:
        yield f"not prepared: {', '.join(absent)}"
    yield f"prepared: {title or folder}"
    if not raw.exists():
        yield f"{raw} is not there (any more): what is prepared was not compared with it"


def _counts(split: Mapping[str, Any]) -> str:
    """The counts of a split beside those that the table expects."""
    said = f"{split['records']} records"
    if split["left_out_count"]:
        said += f", {split['left_out_count']} left out (named in prepared.json)"
    if split["expected"] not in (None, split["read"]):
        said += f"; {split['expected']} were expected, {split['read']} are in the annotations"
    return said
