"""Writes a dataset as one JSON file of conversations in LLaVA's layout (`data/llava_json.py`)."""

import json
import os
import pathlib
from collections.abc import Sequence

from jax_instructblip.atomic import write_file
from jax_instructblip.data.prepare.identity import PrepareError, choose_splits
from jax_instructblip.data.readers.dataset import Dataset

USUAL = "train"  # the split that is written by default
_SHOWN = 5  # missing images in an error


def write_conversations(
    dataset: Dataset,
    raw: pathlib.Path,
    out: pathlib.Path,
    splits: Sequence[str] = (),
    max_missing: float = 0.0,
) -> str:
    """Writes one split of a dataset to the file `out`; returns a sentence of counts.

    Images are named relative to the folder of `out`. A row whose image is not there is left out.

    Args:
      dataset: a dataset that has conversations.
      raw: the folder of its original files and images.
      out: the file to write, whose name ends with `.json`; it may replace an older one.
      splits: the one split to write, by default `USUAL`.
      max_missing: the fraction of the rows that may be left out.

    Raises:
      PrepareError: the dataset has no conversations or not that split, `out` is no name of a JSON
        file, several splits are named, or too many images are missing.
      AnnotationError: the annotations cannot be used.
    """
    if dataset.conversations is None:
        raise PrepareError(
            f"{dataset.name} has no conversations to be written: leave out --conversations"
        )
    if len(splits) > 1:
        raise PrepareError(f"one file holds one split, {len(splits)} are named: {list(splits)}")
    if out.suffix != ".json" or out.is_dir():
        raise PrepareError(f"{out}: expected the name of a file that ends with .json")
    (split,) = choose_splits(dataset, raw, splits or [USUAL])
    folder = pathlib.Path(os.path.realpath(out.parent))
    rows, missing, images = [], [], 0
    for row in dataset.conversations(raw, split, out.parent):
        # The folder may not be there yet, so `..` is taken out of the path.
        if "image" in row and not os.path.isfile(os.path.normpath(folder / row["image"])):
            missing.append(row["image"])
            continue
        images += "image" in row
        rows.append(row)
    count = len(rows) + len(missing)
    if not count:
        raise PrepareError(f"{raw}: {dataset.name} has no record of the split {split!r}")
    if len(missing) > max_missing * count:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise PrepareError(
            f"{len(missing)} of {count} images are not there: {shown}; complete them, or raise "
            "--max_missing"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    said = f"{out}: {len(rows)} conversations of {dataset.name} {split}, {images} with an image"
    said += f"; {len(missing)} left out, whose images are not there" if missing else ""
    expected = dataset.counts.get(split)
    if expected not in (None, count):
        said += f"; {expected} were expected, {count} are in the annotations"
    return said
