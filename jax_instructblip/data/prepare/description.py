"""Describes a prepared dataset for people."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jax_instructblip.data.prepare.shards import read_report
from jax_instructblip.data.readers.dataset import Dataset


def describe(
    folder: pathlib.Path, dataset: Dataset, raw: pathlib.Path, title: str = ""
) -> Iterator[str]:
    """Yields lines about a prepared dataset: the records of each split, and what is missing.

    That is records left out, or fewer than the table of datasets has, and splits not prepared. The
    counts are those of the report in `folder`. `raw` is the folder of the original files, of which
    a line tells if it is gone; `title` names the dataset instead of the path of `folder`.
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
    """Returns a sentence: the numbers of records that a split has, left out, and should have."""
    said = f"{split['records']} records"
    if split["left_out_count"]:
        said += f", {split['left_out_count']} left out (named in prepared.json)"
    if split["expected"] not in (None, split["read"]):
        said += f"; {split['expected']} were expected, {split['read']} are in the annotations"
    return said
