"""Writes files and folders that appear only when complete, and never replace an existing folder."""

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from jax_instructblip.fields import text_problem
from jax_instructblip.files import local_path, path_problem

_TRIES = 1000  # to lock a folder that others make and remove; all of them take a moment


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields a hidden sibling folder to write to; renames it to `folder` if the block succeeds.

    After an error nothing remains. After `kill -9` the hidden folder remains, and the next writer
    of the same folder deletes it. An existing folder is never overwritten (FileExistsError).
    """
    folder = local_path(folder).absolute()
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    temporary = folder.parent / f".{folder.name}.partial-{socket.gethostname()}-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        refuse_existing(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_file(path: Path, text: str) -> None:
    """Writes a text file atomically: after a kill or on a full disk the old file is unchanged."""
    path = local_path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(encode_utf8(text))
    temporary.replace(path)


def encode_utf8(text: str) -> bytes:
    r"""Encodes `text` as UTF-8; lone surrogates, which UTF-8 cannot encode, become escapes.

    Such an escape, `\ud83d` for example, is the right one in JSON. So results can always be
    written, whatever texts they contain.
    """
    return text.encode("utf-8", "backslashreplace")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process at a time run the block; the others wait.

    The lock is on the file `path`, which is made and emptied. It ends when its process is killed.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_alone(file: int, path: Path) -> None:
    """Locks the file descriptor `file`, of a file or folder; the lock ends with its process.

    `path` is its name in the error.

    Raises:
        ValueError: another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process writes to {path}: wait until it ends") from None


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Makes a folder if it does not exist, and locks it during the block; does not wait.

    If the folder is empty at the end, it is removed.

    Raises:
      ValueError: another process holds the lock.
    """
    lock = _locked_folder(folder)
    try:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(lock), os.stat(folder)):  # no other writer's
                    folder.rmdir()
    finally:
        os.close(lock)


def _locked_folder(folder: Path) -> int:
    """Makes, opens and locks a folder; tries again if another writer removed it meanwhile."""
    for left in reversed(range(_TRIES)):
        lock = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            lock_alone(lock, folder)
            if os.path.samestat(os.fstat(lock), os.stat(folder)):
                return lock
        except BaseException as error:
            if lock >= 0:
                os.close(lock)
            if not left or not isinstance(error, FileNotFoundError | FileExistsError):
                raise
        else:
            os.close(lock)
    raise OSError(f"{folder} is removed again and again by others: write to another folder")


def set_aside(path: Path, word: str = "aside") -> Path:
    """Renames `4` to `4.aside`, or `a.jsonl` to `a.aside.jsonl`; returns the new path.

    `word` replaces `aside`. If this name exists, the next free one of `4.aside-2`, `4.aside-3`, ...
    is used.
    """
    stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    number = 1
    while True:
        name = f"{stem}.{word}{'' if number == 1 else f'-{number}'}{suffix}"
        if not os.path.lexists(path.with_name(name)):
            path.rename(path.with_name(name))
            return path.with_name(name)
        number += 1


def refuse_existing(folder: str | os.PathLike) -> None:
    """Raises FileExistsError if `folder` exists and is not empty.

    Also raises an OSError if it cannot be made, and a ValueError for the current working directory,
    which must not be replaced by a renamed folder, and for names that cannot be encoded.
    """
    folder = local_path(folder)
    if folder.absolute() == Path.cwd():
        raise ValueError(f"{folder.absolute()} is the present folder: give the name of a new one")
    if problem := text_problem(os.fspath(folder)):
        raise ValueError(f"{folder} {problem}; choose another name")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not overwritten: remove it, or choose another folder"
        )
    if problem := unwritable(folder):
        raise OSError(f"{folder} cannot be made: {problem}; choose another folder")


def unwritable(folder: str | os.PathLike) -> str:
    """Returns the reason why `folder`, which need not exist, cannot be written; "" if it can."""
    if problem := path_problem(folder) or text_problem(os.fspath(folder)):
        return f"it {problem}"
    place = Path(folder).absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        return f"{there} is a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written to (read-only, or another user's)"
    return ""


def _remove_abandoned(folder: Path) -> None:
    """Deletes temporary folders that killed writers of `folder` left on this machine."""
    prefix = f".{folder.name}.partial-{socket.gethostname()}-"
    for left in folder.parent.glob(".*"):
        process = left.name.removeprefix(prefix)
        if process == left.name or not process.isdecimal():
            continue
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except PermissionError:
            continue  # alive, and somebody else's


def free_bytes(folder: str | os.PathLike) -> int:
    """Returns the free bytes on the disk of `folder`, which need not exist."""
    place = Path(folder).absolute()
    return shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free


def check_room(path: str | os.PathLike, needed: int) -> None:
    """Raises an OSError if the disk of `path` has fewer than `needed` free bytes."""
    free = free_bytes(path)
    if free < needed:
        raise OSError(f"{path} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there")
