"""Prepares a dataset on the disk and then copies it to an object store (`gs://...`)."""

import os
from pathlib import Path
from typing import Any

from jax_instructblip import remote, stores
from jax_instructblip.data.prepare import shards
from jax_instructblip.data.readers.dataset import Dataset


def prepare_to_store(
    dataset: Dataset, raw: str | os.PathLike[str], out: str, **options: Any
) -> tuple[Path, str]:
    """Returns a local folder with the dataset's report, and the dataset's address in the store.

    `out` is the address of prepared datasets; `options` are arguments of `shards.prepare`. Shards
    are written to a local folder first, where a killed run can be resumed; they are removed after
    the copy.

    Raises:
        ValueError: the store cannot be written to.
        AnnotationError, PrepareError: as `shards.prepare`, also if the store has another dataset
            there.
        OSError: a file could not be copied; the prepared dataset stays on the disk.
    """
    remote.check(out)
    address = f"{out}/{dataset.name}/{shards.VERSION}"
    home = stores.working_folder(out)
    done = home / dataset.name / shards.VERSION
    there = remote.stamps(address)
    if shards.REPORT in there:
        small = [name for name in (shards.REPORT, shards.CANDIDATES) if name in there]
        remote.get_files(address, {name: done / name for name in small})
    shards.prepare(dataset, raw, home, **options)
    if shards.REPORT not in there:
        stores.send(done, address, last=shards.REPORT)
        for path in done.iterdir():  # later reads fetch a copy from the store
            if path.suffix != ".json":
                path.unlink()
    return done, address
