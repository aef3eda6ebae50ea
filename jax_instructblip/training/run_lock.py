"""A lock file that lets only one run use a folder; released when the process ends."""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from jax_instructblip.files import parse_json

FILE = "run.lock"


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that uses a folder.

    Attributes:
      host: the name of its machine.
      process: its process id.
      since: the time when it began to use the folder, such as "2025-01-31 12:00:00 UTC".
    """

    host: str
    process: int
    since: str

    @classmethod
    def me(cls) -> "Owner":
        """Returns this process, with the current time as `since`."""
        return cls(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %Z"))

    @classmethod
    def parse(cls, text: str | bytes) -> "Owner | None":
        """Parses the output of `to_json`; returns None if `text` is something else."""
        try:
            return cls(**parse_json(text))
        except (ValueError, TypeError):
            return None

    def to_json(self) -> str:
        """Returns the owner as one line of JSON."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}"


class RunLock:
    """An exclusive lock on a local folder.

    The operating system releases it when the process ends, also after a kill.

    Attributes:
      problem: why the folder could not be locked; "" if it is locked.
    """

    def __init__(self, folder: Path):
        """Locks `folder`, which must exist; sets `problem` if its file system has no locks.

        Raises:
            ValueError: another process holds the lock; the message names it.
        """
        self._path = folder / FILE
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = Owner.parse(os.pread(self._file, 4096, 0)) or "a process that just started"
                os.close(self._file)
                raise ValueError(
                    f"{folder} is in use by another run ({owner}): wait for it to end, stop it, or "
                    "choose another config.workdir"
                ) from None
            except OSError as error:  # the file system has no locks
                os.close(self._file)
                with contextlib.suppress(OSError):
                    self._path.unlink()
                self._file, self.problem = -1, f"{folder} cannot be locked ({error.strerror})"
                return
            # If the previous holder deleted the file in between, this lock is on a deleted file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), self._path.stat()):
                    break
            os.close(self._file)
        self.problem = ""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, Owner.me().to_json().encode(), 0)

    def release(self) -> None:
        """Deletes the lock file and releases the lock."""
        if self._file < 0:
            return
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)
        self._file = -1
