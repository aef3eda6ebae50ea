"""The records behind a path: JSON lines, a prepared folder, tars, or a dataset drawn here."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from jax_instructblip import stores
from jax_instructblip.data import webdataset
from jax_instructblip.data.prepare import builder, shards
from jax_instructblip.data.records import Record, RecordError, read_jsonl
from jax_instructblip.data.shapes import dataset


def open_records(path: str | os.PathLike, split: str) -> tuple[Sequence[Record], str]:
    """The records of one split with random access, and a digest that stands for their content.

    `path` is a file of JSON lines, a folder that `jax-instructblip prepare` wrote, a folder of tars
    with pairs of images and captions (`webdataset.py`), or the name of a drawn dataset (`shapes`),
    which is drawn first where it is absent. Lines that name no split, and tars, are of any split.
    What is at an address of a store is copied to the disk.

    Raises:
        ValueError: there is no such dataset or split; what there is is listed.
        RecordError: a file with bad lines, all of them.
    """
    if path in dataset.DATASETS:
        name = os.fspath(path)
        records = dataset.shapes_source(None, split, name)
        facts = [name, dataset.VERSION, split, len(records), records[0]]
        # It has what is asked of a sequence here, length and index, but is none by name.
        records = cast(Sequence[Record], records)
        return records, hashlib.sha256(repr(facts).encode()).hexdigest()
    name = os.fspath(stores.input_rows(path))
    if (folder := prepared_folder(name)) is not None:
        records = cast(Sequence[Record], builder.open_folder(folder, split))
        content = (folder / shards.REPORT).read_bytes()
        return records, f"{hashlib.sha256(content).hexdigest()}-{split}"
    if webdataset.holds_tars(Path(name)):
        records = webdataset.open_tars(name, split=split)
        return cast(Sequence[Record], records), records.digest()
    if not name.endswith((".jsonl", ".json")):
        raise ValueError(
            f"no records at {name!r}: expected a file of JSON lines (.jsonl), a folder that "
            "`jax-instructblip prepare` wrote, a folder of tars (img2dataset), or one of "
            f"{', '.join(dataset.DATASETS)}"
        )
    records = read_jsonl(name)
    splits = sorted({record.split for record in records})
    if splits != [""]:
        records = [record for record in records if record.split == split]
    if not records:
        raise RecordError(f"{name} has no record of the split {split!r}:", [f"it has {splits}"])
    with Path(name).open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return records, f"{content}-{split}"


def prepared_folder(path: str | os.PathLike) -> Path | None:
    """The folder of a prepared dataset: `path`, or its subfolder VERSION; None for no such."""
    path = stores.input_rows(path)
    places = (path, path / shards.VERSION)
    return next((each for each in places if (each / shards.REPORT).is_file()), None)


def dataset_name(path: str | os.PathLike) -> str:
    """The name of the dataset that a prepared folder holds; "" for anything else."""
    folder = prepared_folder(path)
    return "" if folder is None else shards.read_report(folder)["name"]
