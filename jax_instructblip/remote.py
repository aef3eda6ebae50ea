"""Folders of an object store (`gs://`, `s3://`, ...), as far as a run needs them.

A store puts a file whole or not at all, but knows no renaming of folders and no appending. So a
folder is complete when one file of it is there, which is put last and removed first.
"""

import errno
import os
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

LIBRARIES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # that etils.epath asks for
TRIES = 3  # of each file: stores fail now and then
AT_ONCE = 16  # files on their way: a store takes a tenth of a second for the smallest
PAUSE_SECONDS = 1.0  # after the first failure; twice as long after the next one


def is_remote(path: str | os.PathLike) -> bool:
    """Tells whether it is an address (`gs://bucket/run`) and no path of a disk."""
    return "://" in os.fspath(path)


def check(folder: str) -> None:
    """Raises a ValueError, with what to do, where the folder cannot be written to and read."""
    scheme = folder.partition("://")[0]
    if scheme not in LIBRARIES:
        known = ", ".join(f"{name}://" for name in LIBRARIES)
        raise ValueError(f"{folder} cannot be used: known are {known}")
    try:
        probe = epath.Path(folder) / f".probe-{uuid.uuid4().hex}"
        probe.write_text("probe")
        found = probe.read_text()
        probe.unlink()
    except ImportError as error:
        how = f"pip install {LIBRARIES[scheme]}"
        raise ValueError(f"{folder} cannot be used: {_words(error)} ({how})") from error
    except Exception as error:  # each store has errors of its own
        raise ValueError(
            f"{folder} cannot be written to: {_words(error)}; is the bucket's name right, and may "
            "this machine write there?"
        ) from error
    if found != "probe":
        raise ValueError(f"{folder} gives back other bytes than were written to it")


def names(folder: str) -> list[str]:
    """The names of what is in the folder; none where it is not there."""
    place = epath.Path(folder)
    return sorted(path.name for path in place.iterdir()) if place.exists() else []


def holds(folder: str, name: str) -> bool:
    """Tells whether there is that file in the folder."""
    return (epath.Path(folder) / name).exists()


def read(folder: str, name: str) -> bytes | None:
    """The bytes of that file; None where it is not there."""
    path = epath.Path(folder) / name
    return path.read_bytes() if path.exists() else None


def put(local: Path, folder: str, *, last: str = "") -> None:
    """Copies all files below `local` into the folder, the one named `last` after all others.

    Raises:
        OSError: a file could not be copied; `last` is not there then.
    """
    place = epath.Path(folder)
    target = lambda path: place / path.relative_to(local).as_posix()
    files = {path: target(path) for path in sorted(local.rglob("*")) if path.is_file()}
    final = files.pop(local / last, None)
    _copy_all(files)
    if final is not None:
        _copy_all({local / last: final})


def put_file(path: Path, folder: str) -> None:
    """Copies that file, which may grow meanwhile, into the folder; raises OSError."""
    data = path.read_bytes()
    _try(lambda target: target.write_bytes(data), epath.Path(folder) / path.name)


def get(folder: str, local: Path) -> None:
    """Copies all files of the folder below `local`; raises OSError, also where there are none."""
    system, place = fsspec.url_to_fs(folder)
    names = [name.removeprefix(place).lstrip("/") for name in _try(system.find, place)]
    if not names:
        raise FileNotFoundError(errno.ENOENT, f"{folder} has no files")
    _copy_all({epath.Path(folder) / name: local / name for name in names})


def remove(folder: str, *, first: str = "") -> None:
    """Removes the folder, that file before all others; raises OSError."""
    place = epath.Path(folder)
    if first and (place / first).exists():
        _try((place / first).unlink)
    if place.exists():
        _try(place.rmtree)


def remove_file(folder: str, name: str) -> None:
    """Removes that file; raises OSError, also where it is not there."""
    _try((epath.Path(folder) / name).unlink)


def _copy_all(pairs: Mapping[Any, Any]) -> None:
    """Copies files to files, some at a time; raises the first OSError."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        copies = [pool.submit(_try, _copy, *pair) for pair in pairs.items()]
        try:
            for copy in copies:
                copy.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _copy(source: Any, target: Any) -> None:
    target = epath.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    epath.Path(source).copy(target, overwrite=True)
    wanted, found = (epath.Path(each).stat().length for each in (source, target))
    if found != wanted:
        raise OSError(f"{target} has {found} bytes, expected {wanted}")


def _try(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work`, tried `TRIES` times; an OSError where all fail."""
    for number in range(1, TRIES + 1):
        try:
            return work(*arguments)
        except Exception as error:  # each store has errors of its own
            if number == TRIES:
                where = arguments[-1] if arguments else "removing"
                raise OSError(
                    getattr(error, "errno", None) or errno.EIO,
                    f"{where}: {_words(error)} ({number} tries)",
                ) from error
            time.sleep(PAUSE_SECONDS * 2 ** (number - 1))


def _words(error: Exception) -> str:
    """The first line of an error, with the error's name where that is an address or nothing."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line if " " in line else f"{type(error).__name__} {line}".strip()
