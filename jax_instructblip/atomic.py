"""Folders and files that appear whole or not at all, and never replace another."""

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from jax_instructblip.fields import text_problem
from jax_instructblip.files import local_path, path_problem


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields a hidden sibling to write into, which becomes `folder` when the block ends well.

    After an error nothing is left; after `kill -9` only the hidden sibling is, which the next
    writer of the same folder removes. An existing folder is never overwritten (FileExistsError).
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
    """Writes a file that appears whole: after `kill -9` or on a full disk the old one stands."""
    path = local_path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(encode_utf8(text))
    temporary.replace(path)


def encode_utf8(text: str) -> bytes:
    r"""The text in UTF-8, with \udc00 for half of a surrogate pair, which in JSON stands for it.

    What was computed is written, whatever the texts are that it was computed from.
    """
    return text.encode("utf-8", "backslashreplace")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock of a killed one is gone with it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def set_aside(path: Path, word: str = "aside") -> Path:
    """Renames a file or folder, `4` to `4.aside` and `a.jsonl` to `a.aside.jsonl`; the new path.

    Where that stands already, it is `4.aside-2`, and so on: nothing is replaced.
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
    """Raises FileExistsError where a writer would have to overwrite; an empty folder may stand.

    The present folder may not: it would be another one under the feet of who is there.
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


def unwritable(folder: str | os.PathLike) -> str:
    """The reason why this folder, which may not exist yet, cannot be written to; "" if it can."""
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
    """Removes what killed writers of the same folder on this machine have left."""
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
    """Bytes that are free where this folder is or would be made."""
    place = Path(folder).absolute()
    return shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free


def check_room(path: str | os.PathLike, needed: int) -> None:
    """Raises an OSError where the disk of `path` has less room than that many bytes."""
    free = free_bytes(path)
    if free < needed:
        raise OSError(f"{path} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there")
