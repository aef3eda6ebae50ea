"""The folder of a run: on a local disk, or in an object store with a local copy during the run.

A local folder is locked: a second run in it is refused. A store has no locks. There the run leaves
a note with its process. A later run that finds the note replaces it with a warning, and the earlier
one, if it still runs, notices this before its next save and stops.
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
    """A context manager for a run's folder; files are written to `workdir.folder`.

    Use it as `with Workdir("gs://bucket/run") as workdir:`. Call `fetch` before files are written,
    and `push` to upload them.

    Attributes:
      folder: the local folder.
      store: the object-store address; "" if the run is kept on the disk.
    """

    def __init__(self, location: str):
        """Prepares the workdir at `location`, a path or object-store address; locks nothing yet."""
        self.store = location.rstrip("/") if remote.is_remote(location) else ""
        self.folder = Path(tempfile.mkdtemp(prefix="run-") if self.store else location)
        self._lock: RunLock | None = None
        self._note = ""

    def __enter__(self) -> "Workdir":
        """Locks a local folder if it exists; raises a ValueError if another run uses it."""
        if not self.store:
            self._take_lock(must_exist=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
        if self._note:
            with contextlib.suppress(OSError):  # the error that ended the run matters more
                if remote.read(self.store, FILE) == self._note.encode():
                    remote.remove_file(self.store, FILE)
        if self.store:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __str__(self) -> str:
        return self.store or str(self.folder)

    def fetch(self) -> None:
        """Creates and locks the folder; from an object store, downloads .json and .jsonl files.

        Raises:
            ValueError: another run uses the folder.
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
        """Uploads all files except checkpoints to the object store, if there is one, on process 0.

        Raises:
            OSError: a file could not be copied, or another run has taken over the store.
        """
        if not self.store or jax.process_index() > 0:
            return
        self.check_owner()
        for path in self.folder.rglob("*"):
            relative = path.relative_to(self.folder)
            if path.is_file() and relative.parts[0] != "checkpoints":
                remote.put_file(path, "/".join([self.store, *relative.parts[:-1]]))

    def check_owner(self) -> None:
        """Raises an OSError if another run has replaced this run's note in the object store."""
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
        """Locks the folder on process 0 if not locked yet; on failure all processes raise."""
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
