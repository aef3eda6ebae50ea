"""Checks that a prepared dataset was made from the same files and options as are given now.

A survey reads the original annotations (in RAW, the folder they were downloaded to) once, before
anything is written, and computes digests of all records and image files. A finished or unfinished
dataset that already exists must have the same digests; otherwise a `PrepareError` lists the
differences.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.records import ImageSource, Record
from jax_instructblip.files import FileSlice
from jax_instructblip.progress import Progress

SAMPLED = 16  # pictures of a shard that are hashed; of the others only the size is
SAMPLED_BYTES = 2**20  # hashed of one picture or video, from its start

CURE = (
    "remove it to prepare it anew, choose another --out, or give RAW and options as they were then"
)


class PrepareError(ValueError):
    """A dataset cannot be prepared as asked; finished shards stay for the next run."""


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of the original files, as `survey` found it.

    Attributes:
      name: the name of the split.
      records: its number of records.
      digest: a hash of all fields of all records, images by their paths below RAW.
      group: the number of records that share a digest in `pictures`; the last group may be smaller.
      pictures: a digest of the image files of each group.
    """

    name: str
    records: int
    digest: str
    group: int
    pictures: tuple[str, ...]

    def shards(self, size: int) -> int:
        """Returns the number of shards of `size` records that the split takes."""
        return max(1, -(-self.records // size))


def choose_splits(dataset: Dataset, raw: pathlib.Path, splits: Sequence[str]) -> list[str]:
    """Returns `splits`, or if that is empty, all splits whose annotation files are in `raw`.

    If there are none either, it returns the dataset's first split, whose reader then names the
    missing files.

    Raises:
        PrepareError: a split is unknown, or `raw` is no folder.
    """
    if unknown := sorted(set(splits) - set(dataset.files)):
        raise PrepareError(f"{dataset.name} has no splits {unknown}; known: {list(dataset.files)}")
    if not raw.is_dir():
        raise PrepareError(f"{raw} is no folder: it should hold the files of {dataset.name}")
    # Without any files take the first split: its reader says which files are missing.
    return list(splits) or dataset.present(raw) or list(dataset.files)[:1]


def survey(dataset: Dataset, raw: pathlib.Path, name: str, group: int) -> Split:
    """Returns the number of records and the digests of split `name`; reads its annotations once.

    Every `group` records share a digest of their image files. A bad row raises here, before
    anything is written.

    Raises:
        AnnotationError: a row cannot be used, or the split has no records.
    """
    digest, count, pictures = hashlib.sha256(), 0, []
    chunk: list[Record] = []
    with Progress(dataset.counts.get(name), f"reading {dataset.name} {name}", "records") as line:
        for record in dataset.read(raw, name):
            images = tuple(_below(raw, image) for image in record.images)
            digest.update(repr(dataclasses.replace(record, images=images)).encode())
            count += 1
            chunk.append(record)
            if len(chunk) == group:
                pictures.append(pictures_digest(chunk))
                chunk = []
            line.update()
    if not count:
        raise AnnotationError(f"{raw}: {dataset.name} has no record of the split {name!r}")
    if chunk:
        pictures.append(pictures_digest(chunk))
    return Split(name, count, digest.hexdigest(), group, tuple(pictures))


def _below(raw: pathlib.Path, image: ImageSource) -> ImageSource:
    """Returns the image with its path relative to `raw`; an image without a path as text."""
    if isinstance(image, FileSlice):
        return dataclasses.replace(image, path=os.path.relpath(image.path, raw))
    return os.path.relpath(image, raw) if isinstance(image, str) else str(image)


def pictures_digest(records: Sequence[Record]) -> str:
    """Returns a digest of the records' image files: all sizes, and the content of some of them.

    About `SAMPLED` records have their images read. A missing file has a digest of its own, so that
    the digest changes when the file appears.
    """
    digest = hashlib.sha256()
    step = -(-len(records) // SAMPLED)
    for index, record in enumerate(records):
        for image in record.images:
            digest.update(_picture(image, content=index % step == 0))
    return digest.hexdigest()


def _picture(image: Any, content: bool) -> bytes:
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    if not isinstance(image, str | FileSlice):
        return b"drawn"
    try:
        if isinstance(image, FileSlice):
            part = image.read()[:SAMPLED_BYTES] if content else b""
            return f"{image.size};".encode() + hashlib.sha256(part).digest()
        size = os.stat(image).st_size
        if not content or not os.path.isfile(image):  # a pipe would block
            return f"{size};".encode()
        with open(image, "rb") as file:
            return f"{size};".encode() + hashlib.sha256(file.read(SAMPLED_BYTES)).digest()
    except (OSError, ValueError):
        return b"absent;"


def refuse_other(
    folder: pathlib.Path,
    report: Mapping[str, Any],
    *,
    names: Sequence[str],
    read: Iterable[Split],
    options: Mapping[str, Any],
    max_missing: float,
    candidates: Sequence[Sequence[str]] = ((), ()),
) -> None:
    """Raises a PrepareError with all points in which a finished dataset is not what is asked for.

    Args:
      folder: the folder of the finished dataset.
      report: its report; one of an older version of this program has fewer entries.
      names: the splits that are asked for.
      read: surveys of splits in RAW; empty where RAW no longer exists.
      options: options that change what is stored, by the names of their flags.
      max_missing: the fraction of a split's records that may lack a usable image or text.
      candidates: the shared candidates (answers that every record is ranked over) of the folder,
        and those of RAW.
    """
    wrong = list(_changed_options(report.get("options", {}), options))
    splits = report["splits"]
    if lacking := sorted(set(names) - set(splits)):
        wrong.append(
            f"it was prepared without {', '.join(lacking)} (it has {', '.join(splits)}): remove it "
            "and name all splits, or prepare into another folder"
        )
    for split in read:
        if split.name in splits:
            wrong += _changed_records(splits[split.name], split)
    for name in sorted(set(names) & set(splits)):
        left_out, count = splits[name]["left_out_count"], splits[name]["read"]
        if left_out > max_missing * count:
            wrong.append(
                f"{name}: {left_out} of {count} records were left out, more than --max_missing "
                f"{max_missing:g} allows"
            )
    if tuple(candidates[0]) != tuple(candidates[1]):
        wrong.append(f"its {len(candidates[0])} candidates are not the {len(candidates[1])} of RAW")
    if wrong:
        raise PrepareError(
            "\n  ".join([f"{folder} holds other data than asked for:", *wrong]) + f"\n{CURE}"
        )


def refuse_other_draft(folder: pathlib.Path, before: Any, settings: Mapping[str, Any]) -> None:
    """Raises a PrepareError if the unfinished run in `folder` began with other settings.

    `before` are the settings it began with, `settings` those of now: the options by name, and as
    `splits` the digest of the annotations of each split.
    """
    if before == settings:
        return
    before = before if isinstance(before, dict) else {}
    splits = before.get("splits", {}), settings["splits"]
    wrong = list(_changed_options(before, {k: v for k, v in settings.items() if k != "splits"}))
    if list(splits[0]) != list(splits[1]):
        wrong.append(f"splits were {', '.join(splits[0])}, now {', '.join(splits[1])}")
    wrong += [
        f"{name}: other annotations, or read by another version of the program"
        for name, digest in splits[1].items()
        if splits[0].get(name, digest) != digest
    ]
    raise PrepareError(
        "\n  ".join(
            [f"{folder} was begun with other files, splits or shard size or frames:", *wrong]
        )
        + "\nfinish it with those, or remove it"
    )


def _changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, value in now.items():
        if before.get(name, value) != value:
            yield f"--{name} was {before[name]}, now it is {value}"


def _changed_records(recorded: Mapping[str, Any], split: Split) -> Iterator[str]:
    if (recorded["read"], recorded["annotations"]) != (split.records, split.digest):
        yield (
            f"{split.name}: its {recorded['read']} records are of other annotations than the "
            f"{split.records} of RAW, or were read by another version of the program"
        )
        return
    known = recorded.get("pictures", {})
    if known.get("group") == split.group:
        other = sum(a != b for a, b in zip(known["digests"], split.pictures, strict=True))
        if other:
            yield (
                f"{split.name}: image files of {other} times {split.group} records are others in "
                "RAW now, or were missing then"
            )
