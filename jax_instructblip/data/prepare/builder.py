"""Stores records as ArrayRecord files with one TFDS builder, and reads them without TensorFlow.

    records of each split --prepare--> FOLDER/jax_instructblip_records/NAME/VERSION/*.array_record*
    FOLDER, NAME, split --source--> random access: len(source), source[i] -> Record

The argument `splits` maps the name of each split to a function that returns its records.

TFDS gives the layout, the shards, the metadata and an atomic finish (it writes to a folder of
another name and renames it). TensorFlow is not imported, because the file format is ArrayRecord,
images are given as encoded files (TensorFlow would encode arrays), and rows are read back as bytes,
whose images `data/images.py` decodes.
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

BUILDER = "jax_instructblip_records"  # TFDS names the folder by the builder's class
TEXTS = ("id", "prompt", "task", "split", "context")
LISTS = ("answers", "choices", "ocr")
NUMBERS = ("correct", "blank")
STRINGS = (*TEXTS, *LISTS, "history")

DESCRIPTION = "Questions about images, with their answers."

Splits = Mapping[str, Callable[[], Iterable[Record]]]


def record_features() -> tfds.features.FeaturesDict:
    """Returns the TFDS features (names and types) in which a record is stored."""
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
    """Returns the record as a row of `record_features`; images become paths or file objects.

    TFDS reads the images from these.
    """
    row: dict[str, Any] = {name: getattr(record, name) for name in (*TEXTS, *NUMBERS)}
    row |= {name: list(getattr(record, name)) for name in (*LISTS, "times")}
    row["history"] = [text for turn in record.history for text in turn]
    row["images"] = [_file(image) for image in record.images]
    return row


@dataclasses.dataclass
class RecordsConfig(tfds.core.BuilderConfig):
    """The configuration of one dataset: for each split a function that returns its records.

    With `beam` the function returns an Apache Beam transform instead. It produces (number, row):
    the record's place in the split, and the record as `record_row` has it.
    """

    splits: Splits = dataclasses.field(default_factory=dict)
    beam: bool = False


class JaxInstructblipRecords(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of all datasets; a `RecordsConfig` says which dataset it builds."""

    VERSION = tfds.core.Version("1.0.0")
    # Also keeps TFDS from looking for a README and checksums beside this file.
    pkg_dir_path: Any = pathlib.Path(__file__).parent / "absent"
    builder_config: RecordsConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION,
            features=record_features(),
            disable_shuffling=True,  # keep the reader's order; the mixture shuffles
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {
            name: records() if self.builder_config.beam else enumerate(map(record_row, records()))
            for name, records in self.builder_config.splits.items()
        }

    def _generate_examples(self) -> None:
        raise NotImplementedError("each split has its own generator")


class RecordSource:
    """Random access to the records of one split; a Grain `MapDataset.source` can read from it."""

    def __init__(self, rows: Any, name: str, shards: Sequence[tuple[str, int]] = ()):
        """Wraps `rows`, a TFDS data source of serialized rows; `name` names the split in messages.

        `shards` lists the files of the split in order, each with its number of rows.
        """
        self._rows, self._name, self._shards = rows, name, tuple(shards)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """Returns the record at `index`, its images as encoded bytes.

        Raises:
            RecordError: the record cannot be read, because its shard is damaged, cut short or
                missing.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}: {self!r}")
        try:
            return self._read(index)
        except Exception as error:  # errors of Riegeli or protobuf, or a missing field
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
        # TFDS's own decoder handles each feature by its type, which takes five times as long.
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
        """Returns a text with the name of the split, by which Grain recognises a source."""
        return f"RecordSource({self._name})"


def prepare(
    folder: str | os.PathLike[str], name: str, splits: Splits, *, version: str = "1.0.0"
) -> pathlib.Path:
    """Returns the folder of the prepared dataset `name`; writes it first if it is absent.

    A killed run leaves only a folder of another name, which the next run removes, so the dataset is
    complete or absent. If several processes call this, one writes and the others wait. An existing
    folder is found by `name` and `version` alone: change one of them when the records change.

    Raises:
        ValueError: the existing folder has other splits.
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
    """Returns the finished folder `done`; a ValueError if its splits are not exactly `splits`."""
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
    """Returns the records of one split of a dataset that `prepare` wrote.

    Raises:
        FileNotFoundError: the dataset has not been prepared in `folder`.
        ValueError: the dataset has no such split; the message lists those that it has.
    """
    path = pathlib.Path(folder) / BUILDER / name / version
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: prepare the dataset {name!r} first")
    return open_folder(path, split)


def open_folder(path: str | os.PathLike[str], split: str) -> RecordSource:
    """Returns the records of one split of the TFDS folder `path`, whichever program wrote it.

    Raises:
        ValueError: the folder is damaged or has no such split; the message lists those that it has.
    """
    try:
        with quiet():
            builder: Any = tfds.builder_from_directory(path)
    except Exception as error:  # damaged files raise any error of the libraries
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
