"""One run at a time in a folder: a lock that says who holds it, and ends with its process."""

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
    """A process that works in a folder: its host, its number there, the time it began."""

    host: str
    process: int
    since: str

    @classmethod
    def me(cls) -> "Owner":
        """This process, beginning now."""
        return cls(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %Z"))

    @classmethod
    def parse(cls, text: str | bytes) -> "Owner | None":
        """The owner that `str` of `to_json` describes; None where it is no such text."""
        try:
            return cls(**parse_json(text))
        except (ValueError, TypeError):
            return None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}"


class RunLock:
    """The lock of a folder on a disk; the system releases it when its process ends, however."""

    def __init__(self, folder: Path):
        """Takes the lock of the folder, which exists, or raises.

        Raises:
            ValueError: another process holds it; which, where, since when.
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
            except OSError as error:  # a file system that knows no locks
                os.close(self._file)
                with contextlib.suppress(OSError):
                    self._path.unlink()
                self._file, self.problem = -1, f"{folder} cannot be locked ({error.strerror})"
                return
            # The one that held it may have removed the file in between: then this is no longer it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), self._path.stat()):
                    break
            os.close(self._file)
        self.problem = ""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, Owner.me().to_json().encode(), 0)

    def release(self) -> None:
        """Removes the file, which ends the lock."""
        if self._file < 0:
            return
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)
        self._file = -1
