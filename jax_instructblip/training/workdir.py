"""The folder of a run: on a disk, or in an object store with a copy on the disk meanwhile.

A folder on a disk is locked: a second run there is refused. A store knows no locks: there a note
says who works, a run that finds the note of another says so and replaces it, and the other one
stops at its next save, before it writes.
"""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

import jax

from jax_instructblip import remote
from jax_instructblip.parallel.cluster import agree
from jax_instructblip.training.run_lock import FILE, Owner, RunLock


class Workdir:
    """`with Workdir("gs://bucket/run") as workdir:` files are written to `workdir.folder`.

    Attributes:
      folder: the place on the disk.
      store: the address; "" if the run is kept on the disk.
    """

    def __init__(self, location: str):
        """`location` is a path or an address."""
        self.store = location.rstrip("/") if remote.is_remote(location) else ""
        self.folder = Path(tempfile.mkdtemp(prefix="run-") if self.store else location)
        self._lock: RunLock | None = None
        self._note = ""

    def __enter__(self) -> "Workdir":
        """Locks the folder if it exists; raises a ValueError where another run works there."""
        if not self.store:
            self._take_lock(must_exist=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
        if self._note:
            with contextlib.suppress(OSError):  # what ended the run is raised
                if remote.read(self.store, FILE) == self._note.encode():
                    remote.remove_file(self.store, FILE)
        if self.store:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __str__(self) -> str:
        return self.store or str(self.folder)

    def fetch(self) -> None:
        """Makes the folder and locks it; takes the small files from the store.

        Raises:
            ValueError: another run works in the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.store:
            self._take_lock(must_exist=True)
            return
        for name in remote.names(self.store):
            if Path(name).suffix in (".json", ".jsonl"):
                data = remote.read(self.store, name)
                if data is not None:
                    (self.folder / name).write_bytes(data)
        if jax.process_index() == 0:
            self._leave_note()

    def push(self) -> None:
        """Copies what there is, but for checkpoints, to the store.

        Of several processes, the first one does.

        Raises:
            OSError: a file could not be copied, or another run has begun in the store.
        """
        if not self.store or jax.process_index() > 0:
            return
        self.check_owner()
        for path in self.folder.rglob("*"):
            relative = path.relative_to(self.folder)
            if path.is_file() and relative.parts[0] != "checkpoints":
                remote.put_file(path, "/".join([self.store, *relative.parts[:-1]]))

    def check_owner(self) -> None:
        """Raises an OSError where another run has begun in the store since this one did."""
        note = remote.read(self.store, FILE) if self._note else None
        if note is not None and note.decode(errors="replace") != self._note:
            raise OSError(
                f"{self.store} was taken over by another run ({Owner.parse(note)}): this one "
                "ends, and writes nothing more there"
            )

    def _leave_note(self) -> None:
        note = remote.read(self.store, FILE)
        if note is not None:
            print(
                f"{self.store} has the note of a run that has not ended ({Owner.parse(note)}): it "
                "was killed, or goes on, and then it stops at its next save",
                file=sys.stderr,
                flush=True,
            )
        self._note = Owner.me().to_json()
        (self.folder / FILE).write_text(self._note)
        remote.put_file(self.folder / FILE, self.store)
        (self.folder / FILE).unlink()

    def _take_lock(self, *, must_exist: bool) -> None:
        """Locks the folder in the first process; all raise where that one cannot."""
        problem = None
        if self._lock is None and jax.process_index() == 0:
            if must_exist or self.folder.is_dir():
                try:
                    self._lock = RunLock(self.folder)
                    if self._lock.problem:
                        print(
                            f"{self._lock.problem}: see to it that no other run works there",
                            file=sys.stderr,
                        )
                except (ValueError, OSError) as error:
                    problem = error
        agree(problem)
