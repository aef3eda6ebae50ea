"""Patch features of images, which training reads in place of pixels if its vision tower is frozen.

    FOLDER/features.json                 the tower, the preparation of images, count, shard size
    FOLDER/images.npy                    [N, 16] uint8: `images.content_digest` of each image
    FOLDER/00000-of-00012.arrayrecord    a record per image, in that order: the bytes of an `.npz`

    id        the name of the image when it was read
    image     [P, D] uint16: the bits of bfloat16 numbers, which numpy does not know
    problem   in place of `image`: the reason why this image cannot be used

An image is found by its content, so that any number of questions share it and files may move.
`jax_instructblip/training/patch_features.py` writes the folder.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_instructblip.data import images
from jax_instructblip.files import read_json

FACTS, INDEX = "features.json", "images.npy"
FORM = "patches"  # the field `form` of features.json
SUFFIX = "arrayrecord"
# Fields of features.json that training compares with its own; the others describe the list.
TOWER = ("form", "weights", "vision", "dtype", "frozen_dtype", "image_crop", "exif")


class PatchFeatures:
    """The patch features in a folder, found by the content of an image.

    Attributes:
      folder: the folder.
      shape: (P, D), the number of patches of an image and their width.
    """

    def __init__(self, folder: str | os.PathLike, facts: Mapping[str, Any], shape: Sequence[int]):
        """Opens a folder whose features must be of the tower and preparation `facts`.

        `facts` has the fields of features.json that `TOWER` names; `shape` is (P, D).

        Raises:
            FileNotFoundError: there is no such folder, or no features in it.
            ValueError: it has features of something else, all of which is named with both values;
                or some of its shards are missing or damaged.
        """
        self.folder, self.shape = Path(folder), tuple(shape)
        if not (self.folder / FACTS).is_file():
            raise FileNotFoundError(
                f"{self.folder} has no {FACTS}: `jax-instructblip features` with the words of this "
                "run writes the features of its images there"
            )
        recorded = read_json(self.folder / FACTS, dict)
        if wrong := differences(recorded, {name: facts[name] for name in TOWER}):
            title = f"{self.folder} has features of something else than this run reads:"
            hint = "set the fields of the run to these, or write features to another folder"
            raise ValueError("\n  ".join([title, *wrong, hint]))
        self._records = _open_shards(self.folder, recorded)
        self._rows = {row.tobytes(): number for number, row in enumerate(_index(self.folder))}
        if len(self._records) != len(self._rows):
            raise ValueError(
                f"{self.folder} has {len(self._records)} records for {len(self._rows)} images: "
                "a shard is damaged; remove the folder and write the features again"
            )

    def read(self, source: images.Source, record: str) -> np.ndarray:
        """Returns the features [P, D] bfloat16 of an image of the record with the id `record`.

        Raises:
            ImageError: the image cannot be used (as a plain run would find, too).
            ValueError: there are no features of it; the message names the record.
        """
        number = self._rows.get(images.content_digest(source))
        if number is None:
            name = source if isinstance(source, str | os.PathLike) else f"one of {record}"
            raise ValueError(
                f"{record}: {self.folder} has no features of its image {name}, which was added or "
                "changed since they were written: write them again to another folder"
            )
        try:
            with np.load(io.BytesIO(self._records[number]), allow_pickle=False) as file:
                arrays = dict(file)
        except Exception as error:  # the reader raises RuntimeError and others
            raise ValueError(
                f"{self.folder}: record {number} is damaged: {error}; remove its shard, then write "
                "it again"
            ) from error
        if "problem" in arrays:
            raise images.ImageError(str(arrays["problem"]))
        features = arrays["image"].view(ml_dtypes.bfloat16)
        if features.shape != self.shape:
            raise ValueError(
                f"{self.folder}: the features of {arrays['id']} have the shape {features.shape}, "
                f"expected {self.shape}: remove the folder and write them again"
            )
        return features


def differences(recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Returns a line for each of `facts` that differs in `recorded`, with both values.

    `recorded` is the content of features.json.
    """
    plain = json.loads(json.dumps(facts))  # as JSON has them: lists for tuples
    return [
        f"{name} was {recorded.get(name)!r}, now {value!r}"
        for name, value in plain.items()
        if recorded.get(name) != value
    ]


def shard_names(count: int, shard_size: int, suffix: str) -> list[str]:
    """Returns the file names of the shards of `count` images, `00000-of-00012.SUFFIX` and so on."""
    shards = -(-count // shard_size)
    return [f"{number:05d}-of-{shards:05d}.{suffix}" for number in range(shards)]


def _open_shards(folder: Path, recorded: Mapping[str, Any]) -> Any:
    """Returns the records of all shards as one sequence of bytes."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        names = shard_names(recorded["count"], recorded["shard_size"], SUFFIX)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / FACTS} is damaged: {error!r}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(names)} shards, such as {missing[0]}: the same "
            "`jax-instructblip features` as before writes them"
        )
    try:
        return ArrayRecordDataSource([str(folder / name) for name in names])
    except Exception as error:  # the reader raises RuntimeError and others for damaged files
        raise ValueError(f"{folder} has a damaged shard: {error}; remove it, then write it") from (
            error
        )


def _index(folder: Path) -> np.ndarray:
    """Returns the digests [N, 16] uint8 of the images, in the order of their records."""
    try:
        rows = np.load(folder / INDEX, allow_pickle=False)
        if rows.dtype != np.uint8 or rows.ndim != 2:
            raise ValueError(f"it has {rows.dtype} {rows.shape}, expected uint8 [N, 16]")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / INDEX} cannot be used: {error}; remove the folder and write the features "
            "again"
        ) from error
    return rows
