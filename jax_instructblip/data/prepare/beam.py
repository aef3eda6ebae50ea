"""Prepares a dataset on a cluster with Apache Beam: original files to ArrayRecord shards.

    reader --records--> Beam's workers: images read and checked --TFDS--> OUT/NAME/VERSION/

RAW is the folder of the original files, OUT the folder of prepared datasets; all workers must see
both under the same paths. The records and their order are those of `shards.py`; TFDS decides how
many go into each shard.
"""

import functools
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from jax_instructblip.data.images import ImageError
from jax_instructblip.data.prepare import builder, shards
from jax_instructblip.data.prepare.pictures import with_content
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.records import Record, RecordError
from jax_instructblip.data.video import VideoError

GROUP = 1000  # records whose pictures share a digest in the report


def prepare_with_beam(
    dataset: Dataset,
    raw: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    runner: str,
    options: Sequence[str] = (),
    splits: Sequence[str] = (),
    max_missing: float = 0.01,
    frames: int = 4,
) -> pathlib.Path:
    """Returns the folder of the prepared dataset, `OUT/NAME/VERSION`; writes it first if absent.

    Args:
      dataset: a row of the table of datasets.
      raw: the folder of its original files and images.
      out: the folder of prepared datasets.
      runner: the Beam runner: `DirectRunner` (this machine), `FlinkRunner`, `DataflowRunner` ...
      options: flags of that runner, such as `--flink_master=host:8081`.
      splits: the splits to prepare; by default all whose annotation files are in `raw`.
      max_missing: the fraction of a split's records that may lack a usable image.
      frames: number of frames that are kept of each video.

    Raises:
      AnnotationError: a file is missing, of another release, or has a row that cannot be used.
      PrepareError: Beam is not installed, too many images cannot be used, or the folder that exists
        was made of other files or with other options. Nothing unfinished stays.
    """
    try:
        import apache_beam as beam  # pyright: ignore (an extra that tests do without)
        from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore
    except ImportError as error:
        raise shards.PrepareError(
            "Apache Beam is not installed: pip install -e '.[beam]', here and on the workers"
        ) from error

    raw, out = pathlib.Path(raw), pathlib.Path(out)
    done = out / dataset.name / shards.VERSION
    frames = frames if dataset.family == shards.VIDEO else 0
    kept = {"frames": frames}  # no shard_size: TFDS decides that
    if done.is_dir() and not raw.exists():
        shards.check_done(done, splits, kept, max_missing)
        return done
    names = shards.choose_splits(dataset, raw, splits)
    group = GROUP
    if done.is_dir():  # `shards.prepare` may have written it, with any shard size
        group = shards.read_report(done).get("options", {}).get("shard_size", group)
    read = {name: shards.survey(dataset, raw, name, group) for name in names}
    candidates = shards.raw_candidates(dataset, raw)
    if done.is_dir():
        shards.check_done(done, names, kept, max_missing, list(read.values()), candidates)
        return done
    rows = functools.partial(_rows, frames=frames)

    def transform(name: str) -> Any:
        numbered = list(enumerate(dataset.read(raw, name)))
        return beam.Create(numbered) | beam.Reshuffle() | beam.FlatMapTuple(rows)

    config = builder.RecordsConfig(
        name=dataset.name,
        version=shards.VERSION,
        splits={name: functools.partial(transform, name) for name in names},
        beam=True,
    )
    draft = done.parent / "beam"
    shutil.rmtree(draft, ignore_errors=True)  # left by a killed run
    try:
        tfds_builder = builder.JaxInstructblipRecords(config=config, data_dir=os.fspath(draft))
        with builder.quiet():
            tfds_builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(
                    compute_stats=tfds.download.ComputeStatsMode.SKIP,
                    try_download_gcs=False,
                    beam_runner=runner,
                    beam_options=PipelineOptions(list(options)),
                ),
            )
        folder = pathlib.Path(tfds_builder.data_path)
        report: dict[str, Any] = {"name": dataset.name, "version": shards.VERSION, "splits": {}}
        report["options"] = kept
        for split in read.values():
            counts = shards.summary(dataset, split, _notes(tfds_builder.info.splits[split.name]))
            counts["left_out_count"] = split.records - counts["records"]
            if counts["left_out_count"] > max_missing * split.records:
                raise shards.PrepareError(
                    f"{dataset.name} {split.name}: {counts['left_out_count']} of {split.records} "
                    f"records cannot be used, more than {max_missing:.1%}; complete the "
                    "images, or raise --max_missing (without Beam the report names them)"
                )
            report["splits"][split.name] = counts
        shards.write_candidates(candidates, folder)
        shards.write_report(folder, report)
        folder.rename(done)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return done


def _rows(number: int, record: Record, *, frames: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row of the builder) of a record, or nothing if its images cannot be used."""
    try:
        usable = with_content(record, frames)
    except (RecordError, ImageError, VideoError):
        return
    yield number, builder.record_row(usable)


def _notes(split: Any) -> list[dict[str, Any]]:
    """Returns the number of records, size and sha256 of each shard of a split that TFDS wrote."""
    notes = []
    for path, records in zip(split.filepaths, split.shard_lengths, strict=True):
        with pathlib.Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = pathlib.Path(path).stat().st_size
        notes.append({"records": records, "bytes": size, "sha256": digest, "left_out": []})
    return notes
