"""Records on disk as ArrayRecord, by one TFDS builder and without TensorFlow.

    records of each split --prepare--> FOLDER/jax_instructblip_records/NAME/VERSION/*.array_record*
    FOLDER, NAME, split --source--> random access: len(source), source[i] -> Record

TFDS gives the layout, the shards, the metadata and the atomic finish (it writes to a folder of
another name and renames it). Three things keep TensorFlow out: the file format, images handed over
as file objects (an array would be encoded by TensorFlow), and rows read back as bytes, of which
`data/images.py` decodes the images.
"""

import contextlib
import dataclasses
import io
import itertools
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from jax_instructblip.atomic import locked
from jax_instructblip.data.records import Record, RecordError

BUILDER = "jax_instructblip_records"  # the folder of TFDS's own naming
TEXTS = ("id", "prompt", "task", "split", "context")
LISTS = ("answers", "choices", "ocr")
NUMBERS = ("correct", "blank")
STRINGS = (*TEXTS, *LISTS, "history")

DESCRIPTION = "Questions about images, with their answers."

Splits = Mapping[str, Callable[[], Iterable[Record]]]


def record_features() -> tfds.features.FeaturesDict:
    """The features in which TFDS stores a record."""
    features = tfds.features
    return features.FeaturesDict(
        {
            **{name: features.Text() for name in TEXTS},
            **{name: features.Sequence(features.Text()) for name in LISTS},
            **{name: features.Scalar(np.int64) for name in NUMBERS},
            "history": features.Sequence(features.Text()),  # question, answer, question ...
            "times": features.Sequence(np.float64),
            "images": features.Sequence(features.Image()),
        }
    )


def record_row(record: Record) -> dict[str, Any]:
    """The record as a row of `record_features`, its images as paths or as files of bytes."""
    row: dict[str, Any] = {name: getattr(record, name) for name in (*TEXTS, *NUMBERS)}
    row |= {name: list(getattr(record, name)) for name in (*LISTS, "times")}
    row["history"] = [text for turn in record.history for text in turn]
    row["images"] = [_file(image) for image in record.images]
    return row


@dataclasses.dataclass
class RecordsConfig(tfds.core.BuilderConfig):
    """One dataset: its name and, for each split, a function that iterates over its records.

    With `beam` the function returns an Apache Beam transform that gives (number, row) instead.
    """

    splits: Splits = dataclasses.field(default_factory=dict)
    beam: bool = False


class JaxInstructblipRecords(tfds.core.GeneratorBasedBuilder):
    """The one builder; a dataset is a `RecordsConfig`."""

    VERSION = tfds.core.Version("1.0.0")
    # Also keeps TFDS from looking for a README and checksums beside this file.
    pkg_dir_path: Any = pathlib.Path(__file__).parent / "absent"
    builder_config: RecordsConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION,
            features=record_features(),
            disable_shuffling=True,  # the mixture shuffles; here the order is the reader's
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {
            name: records() if self.builder_config.beam else enumerate(map(record_row, records()))
            for name, records in self.builder_config.splits.items()
        }

    def _generate_examples(self) -> None:
        raise NotImplementedError("each split has its own generator")


class RecordSource:
    """Random access to the records of one split; what a Grain `MapDataset.source` takes."""

    def __init__(self, rows: Any, name: str, shards: Sequence[tuple[str, int]] = ()):
        """Wraps a TFDS data source that gives the bytes of each row.

        `shards` are the files that hold them, in order, each with its number of rows.
        """
        self._rows, self._name, self._shards = rows, name, tuple(shards)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """The record at `index`, its images as encoded bytes.

        Raises:
            RecordError: it cannot be read: its shard is damaged, cut short or gone.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}: {self!r}")
        try:
            return self._read(index)
        except Exception as error:  # Riegeli's, protobuf's, or a field that is not there
            summary = f"{self._shard(index)}: record {index} of the split cannot be read: " + (
                str(error) or type(error).__name__
            )
            cure = "the file is damaged or incomplete: copy it anew, or prepare the dataset again"
            raise RecordError(summary, [cure]) from error

    def _shard(self, index: int) -> str:
        ends = itertools.accumulate(rows for _, rows in self._shards)
        return next(
            (path for (path, _), end in zip(self._shards, ends, strict=True) if index < end),
            self._name,
        )

    def _read(self, index: int) -> Record:
        # TFDS would look at every feature by its type, which takes five times as long.
        example: Any = tf_example_pb2.Example  # pyright: ignore (its module is made by protobuf)
        row = example.FromString(self._rows[int(index)]).features.feature
        strings = {name: [each.decode() for each in row[name].bytes_list.value] for name in STRINGS}
        fields: dict[str, Any] = {name: strings[name][0] for name in TEXTS}
        fields |= {name: tuple(strings[name]) for name in LISTS}
        turns = strings["history"]
        fields["history"] = tuple(zip(turns[::2], turns[1::2], strict=True))
        fields["correct"] = row["correct"].int64_list.value[0]
        fields["blank"] = sum(row["blank"].int64_list.value)  # older folders do not have it
        fields["times"] = tuple(row["times"].float_list.value)
        return Record(images=tuple(row["images"].bytes_list.value), **fields)

    def __repr__(self) -> str:
        """Names the split: Grain uses it to recognise a source."""
        return f"RecordSource({self._name})"


def prepare(
    folder: str | os.PathLike[str], name: str, splits: Splits, *, version: str = "1.0.0"
) -> pathlib.Path:
    """The folder of the prepared dataset `name`; it is written if it is not there yet.

    A run that is killed leaves a folder of another name, which the next run removes; the dataset is
    there whole or not at all. Of several processes one writes and the others wait. What records
    hold stands behind `name` and `version`: give another where it changes.

    Raises:
        ValueError: what is there has other splits.
    """
    with quiet():
        config = RecordsConfig(name=name, version=version, splits=splits)
        builder = JaxInstructblipRecords(config=config, data_dir=os.fspath(folder))
    done = pathlib.Path(builder.data_path)
    if done.is_dir():
        return _with_splits(done, splits)
    done.parent.mkdir(parents=True, exist_ok=True)
    with locked(done.parent / ".lock"):
        for rest in done.parent.glob("incomplete.*"):
            shutil.rmtree(rest, ignore_errors=True)
        if done.is_dir():  # another process made it meanwhile
            return _with_splits(done, splits)
        with quiet():
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(
                    compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
                ),
            )
    return done


def _with_splits(done: pathlib.Path, splits: Splits) -> pathlib.Path:
    """The finished folder, which must have these splits and no others."""
    with quiet():
        present = sorted(tfds.builder_from_directory(done).info.splits)
    if present != sorted(splits):
        raise ValueError(
            f"{done} has the splits {', '.join(present)}, asked for are "
            f"{', '.join(sorted(splits))}: remove it, or prepare under another name or version"
        )
    return done


def source(
    folder: str | os.PathLike[str], name: str, split: str, *, version: str = "1.0.0"
) -> RecordSource:
    """The records of one split of a prepared dataset.

    Raises:
        FileNotFoundError: the dataset has not been prepared in `folder`.
        ValueError: it has no such split; the message lists those that it has.
    """
    path = pathlib.Path(folder) / BUILDER / name / version
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: prepare the dataset {name!r} first")
    return open_folder(path, split)


def open_folder(path: str | os.PathLike[str], split: str) -> RecordSource:
    """The records of one split of the TFDS folder `path`, whichever program wrote it.

    Raises:
        ValueError: it is damaged, or has no such split; the message lists those that it has.
    """
    try:
        with quiet():
            builder: Any = tfds.builder_from_directory(path)
    except Exception as error:  # of damaged files: whatever the libraries below raise
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        raise ValueError(f"{path} cannot be read ({what}): prepare or copy it again") from error
    if split not in builder.info.splits:
        known = ", ".join(sorted(builder.info.splits))
        raise ValueError(f"{path} has no split {split!r}; its splits: {known}")
    with quiet():
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        rows = builder.as_data_source(split, deserialize_method=raw)
    shards = [
        (each.filename, each.examples_in_shard)
        for each in builder.info.splits[split].file_instructions
    ]
    return RecordSource(rows, f"{path}:{split}", shards)


def _file(image: Any) -> Any:
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if isinstance(image, str):
        return image
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    buffer.seek(0)
    return buffer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS's own progress bars and info lines out of the output."""
    log = logging.getLogger("absl")
    level = log.level
    tfds.disable_progress_bar()
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
