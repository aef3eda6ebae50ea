"""The folder of a run: on a disk, or in an object store with a copy on the disk meanwhile."""

import shutil
import tempfile
from pathlib import Path

import jax

from jax_instructblip import remote


class Workdir:
    """`with Workdir("gs://bucket/run") as workdir:` files are written to `workdir.folder`.

    Attributes:
      folder: the place on the disk.
      store: the address; "" if the run is kept on the disk.
    """

    def __init__(self, place: str):
        """`place` is a path or an address."""
        self.store = place.rstrip("/") if remote.is_remote(place) else ""
        self.folder = Path(tempfile.mkdtemp(prefix="run-") if self.store else place)

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_: object) -> None:
        if self.store:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __str__(self) -> str:
        return self.store or str(self.folder)

    def fetch(self) -> None:
        """Makes the folder; takes the small files from the store."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in remote.names(self.store) if self.store else ():
            if Path(name).suffix in (".json", ".jsonl"):
                data = remote.read(self.store, name)
                if data is not None:
                    (self.folder / name).write_bytes(data)

    def push(self) -> None:
        """Copies what there is, but for checkpoints, to the store; raises OSError.

        Of several processes, the first one does.
        """
        if not self.store or jax.process_index() > 0:
            return
        for path in self.folder.rglob("*"):
            place = path.relative_to(self.folder)
            if path.is_file() and place.parts[0] != "checkpoints":
                remote.put_file(path, "/".join([self.store, *place.parts[:-1]]))
