"""Prepares a dataset with worker processes: original files to ArrayRecord shards; resumable.

    reader --chunks of records--> workers --> OUT/NAME/incomplete.VERSION/NAME-SPLIT.array_record-*
    all shards there --TFDS metadata, report--> OUT/NAME/VERSION/      for `builder.open_folder`

RAW is the folder of the original files, OUT the folder of prepared datasets. A shard is written
under another name and renamed when complete; its note, a JSON file beside it, says what is in it. A
killed run continues with the shards that are missing, and ends with the same bytes (TFDS's own
writer would start again). An existing dataset is compared with what is asked for (`identity.py`).
Records with a missing or damaged image are left out, counted and listed in the report.
"""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, file_adapters, naming

from jax_instructblip import processes
from jax_instructblip.atomic import locked, unwritable, write_file
from jax_instructblip.data.images import ImageError
from jax_instructblip.data.prepare import builder
from jax_instructblip.data.prepare.identity import (
    PrepareError,
    Split,
    choose_splits,
    pictures_digest,
    refuse_other,
    refuse_other_draft,
    survey,
)
from jax_instructblip.data.prepare.pictures import with_content
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.records import Record, RecordError
from jax_instructblip.data.video import VideoError
from jax_instructblip.fields import find_problems, mapping, text
from jax_instructblip.files import ANNOTATION_LIMIT, read_json
from jax_instructblip.progress import Progress

VERSION = "1.1.0"  # of the stored layout; raise it with each change
REPORT = "prepared.json"
_REPORT_FIELDS = {"name": text(), "options": mapping(), "splits": mapping()}
CANDIDATES = "candidates.json"  # file of the answers that all records are ranked over
VIDEO = "video QA"  # the family whose files are videos
LISTED = 1000  # most left out records that the report lists for a split


def prepare(
    dataset: Dataset,
    raw: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    splits: Sequence[str] = (),
    workers: int = 0,
    shard_size: int = 1000,
    max_missing: float = 0.01,
    frames: int = 4,
) -> pathlib.Path:
    """Returns the folder of the prepared dataset, `OUT/NAME/VERSION`; writes it first if absent.

    Args:
      dataset: a row of the table of datasets.
      raw: the folder of its original files and images.
      out: the folder of prepared datasets.
      splits: the splits to prepare; by default all whose annotation files are in `raw`.
      workers: processes that read images and write shards; 0 uses this process alone.
      shard_size: number of records in a shard.
      max_missing: the fraction of a split's records that may lack a usable image or text.
      frames: number of frames kept of each video, evenly spread over it.

    Raises:
        AnnotationError: a file is missing, of another release, or has a row that cannot be used.
        PrepareError: too many images cannot be used, or OUT holds data of other files or options.
    """
    raw, out = pathlib.Path(raw), pathlib.Path(out)
    done = out / dataset.name / VERSION
    frames = frames if dataset.family == VIDEO else 0
    options = {"shard_size": shard_size, "frames": frames}
    if done.is_dir() and not raw.exists():  # the original files were deleted
        check_done(done, splits, options, max_missing)
        return done
    if not done.is_dir() and (problem := unwritable(out)):  # fail before hours of reading
        raise PrepareError(f"--out {out} cannot be used, {problem}: choose another folder")
    names = choose_splits(dataset, raw, splits)
    read = [survey(dataset, raw, name, shard_size) for name in names]
    draft = done.with_name(f"incomplete.{VERSION}")
    candidates = raw_candidates(dataset, raw)

    def is_done() -> bool:
        if done.is_dir():
            check_done(done, names, options, max_missing, read, candidates)
        return done.is_dir()

    if is_done():
        return done
    draft.mkdir(parents=True, exist_ok=True)
    with locked(done.parent / ".lock"):
        if is_done():  # another process made it meanwhile
            return done
        _begin(draft, {**options, "splits": {split.name: split.digest for split in read}})
        report: dict[str, Any] = {"name": dataset.name, "version": VERSION, "options": options}
        report["splits"] = {}
        for split in read:
            notes = _write_split(
                dataset, raw, draft, split, workers, shard_size, max_missing, frames
            )
            report["splits"][split.name] = summary(dataset, split, notes)
        write_candidates(candidates, draft)
        _finish(draft, dataset.name, report)
        draft.rename(done)
    return done


def check_done(
    done: pathlib.Path,
    names: Sequence[str],
    options: Mapping[str, Any],
    max_missing: float,
    read: Sequence[Split] = (),
    candidates: Sequence[str] | None = None,
) -> None:
    """Raises a PrepareError if the finished dataset `done` is not the one that is asked for.

    The arguments are those of `identity.refuse_other`, but `candidates` are those of RAW alone.
    Without `read` and `candidates` the dataset is not compared with RAW.
    """
    stored = read_candidates(done)
    refuse_other(
        done,
        read_report(done),
        names=names,
        read=read,
        options=options,
        max_missing=max_missing,
        candidates=(stored, stored if candidates is None else candidates),
    )


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the report in the folder of a finished dataset.

    Its `splits` has for each split the counts, digests and records left out (`summary`).
    """
    path = pathlib.Path(folder) / REPORT
    report = read_json(path, dict, limit=ANNOTATION_LIMIT)
    if wrong := find_problems({"name": None, "splits": None} | report, _REPORT_FIELDS):
        raise PrepareError(f"{path} is damaged ({'; '.join(wrong)}): prepare the dataset again")
    return report


def raw_candidates(dataset: Dataset, raw: pathlib.Path) -> tuple[str, ...]:
    """Returns the answers that all records are ranked over, read from `raw`; () if none."""
    there = any((raw / name).is_file() for name in dataset.candidate_files)
    return dataset.shared_candidates(raw) if there and dataset.shared_candidates else ()


def write_candidates(candidates: Sequence[str], folder: pathlib.Path) -> None:
    """Writes the answers that all records are ranked over into a dataset's folder.

    Without candidates no file is written.
    """
    if candidates:
        write_file(folder / CANDIDATES, json.dumps(candidates, ensure_ascii=False) + "\n")


def read_candidates(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Returns the answers that all records of a prepared dataset are ranked over; () if none."""
    path = pathlib.Path(folder) / CANDIDATES
    return tuple(read_json(path, list)) if path.is_file() else ()


def write_report(folder: pathlib.Path, report: dict[str, Any]) -> None:
    """Writes the report of a dataset into its folder, for `read_report`."""
    write_file(folder / REPORT, json.dumps(report, indent=1) + "\n")


def _begin(draft: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes the settings into a new unfinished folder; in an older one they must be the same."""
    path = draft / "settings.json"
    if path.is_file():
        refuse_other_draft(draft, read_json(path), settings)
        return
    write_file(path, json.dumps(settings))


def _write_split(
    dataset: Dataset,
    raw: pathlib.Path,
    draft: pathlib.Path,
    split: Split,
    workers: int,
    size: int,
    max_missing: float,
    frames: int,
) -> list[dict[str, Any]]:
    """Writes the missing shards of a split; returns the notes of all its shards, in order."""
    count = split.shards(size)
    paths = [
        draft / f"{dataset.name}-{split.name}.array_record-{number:05d}-of-{count:05d}"
        for number in range(count)
    ]
    notes: dict[int, dict[str, Any]] = {}
    label = f"writing {dataset.name} {split.name}"
    allowed = max_missing * split.records

    def take(number: int, note: dict[str, Any], line: Progress) -> None:
        notes[number] = note
        left_out = sum(len(each["left_out"]) for each in notes.values())
        line.update(note["read"], note=f"{left_out} left out" if left_out else "")
        if left_out > allowed:
            worst = list(itertools.chain(*(each["left_out"] for each in notes.values())))
            raise PrepareError(
                f"{dataset.name} {split.name}: {left_out} of {split.records} records cannot be "
                f"used, more than {max_missing:.1%}; whole shards stay. The first:\n  "
                + "\n  ".join(f"{id}: {reason}" for id, reason in worst[:10])
                + "\ncomplete the images, or raise --max_missing"
            )

    try:
        with Progress(split.records, label, "records") as line, _pool(workers) as pool:
            running: collections.deque[tuple[int, concurrent.futures.Future]] = collections.deque()
            chunks = _chunks(dataset.read(raw, split.name), size)
            for number, (path, chunk) in enumerate(zip(paths, chunks, strict=True)):
                if (note := _read_note(path, split.pictures[number])) is not None:
                    take(number, note, line)
                    continue
                running.append((number, pool.submit(write_shard, path, chunk, frames)))
                if len(running) > 2 * max(workers, 1):  # few shards in memory
                    number, future = running.popleft()
                    take(number, future.result(), line)
            for number, future in running:
                take(number, future.result(), line)
    except PrepareError:  # all workers have ended
        for path in paths:
            if (note := _read_note(path)) is not None and note["left_out"]:
                _note_path(path).unlink()  # the next run retries its images
        raise
    return [notes[number] for number in range(count)]


def write_shard(path: pathlib.Path, records: Sequence[Record], frames: int = 0) -> dict[str, Any]:
    """Writes one shard and its note, each completely or not at all; returns the note.

    The note has the numbers of records read and written, their bytes, digests, and as `left_out`
    (id, reason) of each record without a usable image or text. `frames` is the number of frames to
    take of a video, 0 for images.
    """
    left_out: list[tuple[str, str]] = []
    sizes: list[int] = []
    features = builder.record_features()
    stored: Any = features.get_serialized_info()
    serializer = example_serializer.ExampleSerializer(stored)

    def rows() -> Iterator[tuple[int, bytes]]:
        for index, record in enumerate(records):
            try:
                usable = with_content(record, frames)
            except (RecordError, ImageError, VideoError) as error:
                said = str(error)
                for file in map(str, record.images[:1]):  # cut its folder: it differs by machine
                    said = said.replace(file, pathlib.Path(file).name)
                left_out.append((record.id, said))
                continue
            example: Any = serializer.get_tf_example(
                features.encode_example(builder.record_row(usable))
            )
            row = example.SerializeToString(deterministic=True)  # else map entries change order
            sizes.append(len(row))
            yield index, row

    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with builder.quiet():
            file_adapters.ArrayRecordFileAdapter.write_examples(temporary, rows())
    except RuntimeError as error:  # the writer raises it only for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} cannot be written ({error}); finished shards stay: make room and run it again"
        ) from error
    note = {"read": len(records), "records": len(sizes), "bytes": sum(sizes), "left_out": left_out}
    note["pictures"] = pictures_digest(records)
    with temporary.open("rb") as file:
        note["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    temporary.replace(path)
    write_file(_note_path(path), json.dumps(note))
    return note


def _chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    records = iter(records)
    while chunk := list(itertools.islice(records, size)):
        yield chunk


def _note_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.json")


def _read_note(path: pathlib.Path, pictures: str = "") -> dict[str, Any] | None:
    """Returns the note of a finished shard; None if the shard must be written (again).

    `pictures` is the digest that its image files have now; if the note has another one, the shard
    must be written again. "" skips this check.
    """
    if not (path.is_file() and _note_path(path).is_file()):
        return None
    note = read_json(_note_path(path), dict)
    return None if pictures and note.get("pictures") != pictures else note


def summary(dataset: Dataset, split: Split, notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the report's entry about one split, made from the notes of its shards.

    `notes` are the results of `write_shard`, in the order of the shards.
    """
    left_out = list(itertools.chain(*(note["left_out"] for note in notes)))
    return {
        "records": sum(note["records"] for note in notes),
        "bytes": sum(note["bytes"] for note in notes),
        "read": split.records,
        "expected": dataset.counts.get(split.name),
        "annotations": split.digest,
        "pictures": {"group": split.group, "digests": split.pictures},
        "shards": [[note["records"], note["sha256"]] for note in notes],
        "left_out_count": len(left_out),
        "left_out": left_out[:LISTED],
    }


def _finish(draft: pathlib.Path, name: str, report: dict[str, Any]) -> None:
    """Writes TFDS's metadata and the report, and removes the notes."""
    folder: Any = draft
    template = naming.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[records for records, _ in counts["shards"]],
            num_bytes=counts["bytes"],
            filename_template=template.replace(split=split),
        )
        for split, counts in report["splits"].items()
    ]
    with builder.quiet():
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=builder.record_features(),
            split_infos=infos,
            filename_template=template,
            version=VERSION,
            check_data=False,
            description=builder.DESCRIPTION,
        )
    write_report(draft, report)
    for note in draft.glob("*.array_record-*.json"):
        note.unlink()
    (draft / "settings.json").unlink(missing_ok=True)


class _Inline(concurrent.futures.Executor):
    """An executor that runs each task at once in this process."""

    def submit(self, fn, /, *args, **kwargs):
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _pool(workers: int) -> concurrent.futures.Executor:
    return processes.pool(workers) if workers else _Inline()
