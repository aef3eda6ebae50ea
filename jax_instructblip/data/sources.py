"""Records from a path: JSON lines, a prepared folder, tars, or the built-in `shapes` dataset."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from jax_instructblip import stores
from jax_instructblip.data import llava_json, webdataset
from jax_instructblip.data.prepare import builder, shards
from jax_instructblip.data.records import Record, RecordError, read_jsonl
from jax_instructblip.data.shapes import dataset


def open_records(
    path: str | os.PathLike, split: str, images: str = "", *, need_prompts: bool = True
) -> tuple[Sequence[Record], str]:
    """Returns the records of one split, with random access, and a digest of their content.

    `path` is one of:

    - a file of JSON lines; if no line has a `split`, all lines belong to every split;
    - a JSON list of whole conversations in LLaVA's layout (`llava_json.py`), of every split;
    - a folder that `jax-instructblip prepare` wrote;
    - a tar or a folder of tars with images and captions (`webdataset.py`), of every split;
    - the name of a built-in dataset (`shapes`), which is drawn and written first where it is
      absent.

    A file or folder of an object store (`gs://...`) is copied to the disk first. `images` is the
    folder of the images that a JSON list of conversations names, "" the list's own folder. A line
    without a prompt is a bad one, unless `need_prompts` is False.

    Raises:
        ValueError: there is no such dataset or split; the message lists those that exist. Or
            `images` is given for records that name their images otherwise.
        RecordError: the file has bad lines; the message lists all of them.
    """
    others = ValueError(
        f"images is {images!r}, but only a JSON list of conversations (LLaVA) has its images in "
        f"another folder, and {os.fspath(path)!r} is none"
    )
    if images and not os.fspath(path).endswith((".jsonl", ".json")):
        raise others
    if path in dataset.DATASETS:
        name = os.fspath(path)
        records = dataset.shapes_source(None, split, name)
        facts = [name, dataset.VERSION, split, len(records), records[0]]
        # It has length and index, all that is used here, but does not subclass Sequence.
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
            f"no records at {name!r}: expected a file of JSON lines (.jsonl), a JSON list of "
            "conversations (.json), a folder that `jax-instructblip prepare` wrote, a folder of "
            "tars (img2dataset), or one of "
            f"{', '.join(dataset.DATASETS)}"
        )
    if llava_json.holds_conversations(name):
        folder = stores.input_path(images, "images") if images else None
        records = llava_json.read_llava_json(name, folder)
    elif images:
        raise others
    else:
        records = read_jsonl(name, need_prompt=need_prompts)
    splits = sorted({record.split for record in records})
    if splits != [""]:
        records = [record for record in records if record.split == split]
    if not records:
        raise RecordError(f"{name} has no record of the split {split!r}:", [f"it has {splits}"])
    with Path(name).open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return records, f"{content}-{split}"


def prepared_folder(path: str | os.PathLike) -> Path | None:
    """Returns the folder of a prepared dataset: `path` or its subfolder VERSION, else None."""
    path = stores.input_rows(path)
    places = (path, path / shards.VERSION)
    return next((each for each in places if (each / shards.REPORT).is_file()), None)


def dataset_name(path: str | os.PathLike) -> str:
    """Returns the name of the dataset in a prepared folder; "" where `path` is no such folder."""
    folder = prepared_folder(path)
    return "" if folder is None else shards.read_report(folder)["name"]
