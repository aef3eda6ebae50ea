"""A dataset prepared on the disk, then moved to a store, where training and evaluation find it."""

import os
from pathlib import Path
from typing import Any

from jax_instructblip import remote, stores
from jax_instructblip.data.prepare import shards
from jax_instructblip.data.readers.dataset import Dataset


def prepare_to_store(
    dataset: Dataset, raw: str | os.PathLike[str], out: str, **options: Any
) -> tuple[Path, str]:
    """A folder that has the report of the prepared dataset, and the dataset's address in the store.

    Shards are written to a folder of copies first; a run that is killed goes on with what is there.
    `out` is the address of prepared datasets; the other arguments are those of `shards.prepare`.

    Raises:
        ValueError: the store cannot be written to.
        AnnotationError, PrepareError: as `shards.prepare`; what the store has is compared, too.
        OSError: a file could not be copied; what was prepared stays on the disk.
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
        for path in done.iterdir():  # what is read next is a copy of what is in the store
            if path.suffix != ".json":
                path.unlink()
    return done, address
