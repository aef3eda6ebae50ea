"""Files in an object store (`gs://`, `s3://`, `az://`), accessed by its client through fsspec.

An upload is atomic for one file, but a store can neither rename folders nor append to files. So a
folder counts as complete if it has one agreed file, which is uploaded last and deleted first.

The arguments `folder` and `address` are normalised addresses, as `address_of` returns them.
"""

import errno
import functools
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

# URL scheme -> package of the client; memory:// exists for tests and lasts as long as the process.
LIBRARIES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "memory": "fsspec"}
TRIES = 3  # attempts per file: stores fail now and then
AT_ONCE = 16  # parallel transfers: even the smallest file takes a tenth of a second
PAUSE_SECONDS = 1.0  # after the first failure, then twice as long each time

# Matches `s3:/bucket` and `./s3:/bucket` too, which `pathlib` and shells make of an address.
_ADDRESS = re.compile(r"(?:\./)*(?P<scheme>gs|gcs|s3|az|memory):/{1,2}(?P<rest>[^/].*)", re.I)
_STAMPS = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "created")


def address_of(path: object) -> str:
    """Returns the normalised object-store address (`gs://bucket/run`); "" for anything else."""
    match = _ADDRESS.fullmatch(os.fspath(path)) if isinstance(path, str | os.PathLike) else None
    if match is None:
        return ""
    scheme = match["scheme"].lower().replace("gcs", "gs")
    return f"{scheme}://{match['rest'].rstrip('/')}"


def is_remote(path: object) -> bool:
    """Returns True if `path` is an object-store address and not a local path."""
    return bool(address_of(path))


def check(folder: str) -> None:
    """Raises a ValueError if a test file in `folder` cannot be written, read and deleted."""
    system, place = _system(folder)
    probe = f"{place}/.probe-{uuid.uuid4().hex}"
    try:
        system.pipe_file(probe, b"probe")
        content = system.cat_file(probe)
        system.rm_file(probe)
    except Exception as error:  # each client has its own exception types
        raise ValueError(
            f"{folder} cannot be written to: {_words(error)}; is the bucket's name right, and may "
            "this machine write there?"
        ) from error
    if content != b"probe":
        raise ValueError(
            f"{folder} is not reliable: a test file with {b'probe'!r} reads back as "
            f"{content[:40]!r}; choose another address"
        )


def names(folder: str) -> list[str]:
    """Returns the names of files and folders directly in `folder`; [] if it does not exist."""
    system, place = _system(folder)
    try:
        listed = _try(system.ls, place, detail=False)
    except FileNotFoundError:
        return []
    return sorted({name.rstrip("/").rpartition("/")[2] for name in listed})


def stamps(address: str) -> dict[str, tuple[int, str]]:
    """Returns name -> (size, version stamp) of all files below `address`.

    The stamp is a text that changes with the content. Names are relative to `address`; if it is
    itself a file, its name is "". {} if nothing is there.
    """
    system, place = _system(address)
    try:
        files = _try(system.find, place, detail=True)
    except FileNotFoundError:
        return {}
    place = place.strip("/")
    return {
        name.strip("/").removeprefix(place).lstrip("/"): (facts["size"], _stamp(facts))
        for name, facts in files.items()
        if facts.get("type") != "directory"
    }


def holds(folder: str, name: str) -> bool:
    """Returns True if `folder` has a file or folder `name`."""
    system, place = _system(folder)
    return bool(_try(system.exists, f"{place}/{name}"))


def read(folder: str, name: str) -> bytes | None:
    """Returns the bytes of the file `name` in `folder`; None if it does not exist."""
    system, place = _system(folder)
    try:
        return _try(system.cat_file, f"{place}/{name}")
    except FileNotFoundError:
        return None


def put(local: Path, folder: str, *, last: str = "") -> None:
    """Uploads all files below `local` to `folder`, under the same relative paths.

    The file `last`, a path relative to `local`, is uploaded after all others; "" means none.

    Raises:
        OSError: a file could not be uploaded; then `last` is not uploaded either.
    """
    files = {
        path: f"{folder}/{path.relative_to(local).as_posix()}"
        for path in sorted(local.rglob("*"))
        if path.is_file()
    }
    final = files.pop(local / last, None)
    _at_once([(_put, path, target) for path, target in files.items()])
    if final is not None:
        _try(_put, local / last, final)


def put_file(path: Path, folder: str) -> None:
    """Uploads a file to `folder` under its own name, replacing an older one.

    If the file is still growing, what it has when it is read is uploaded.

    Raises:
        OSError: the file could not be read or uploaded.
    """
    system, place = _system(folder)
    _try(system.pipe_file, f"{place}/{path.name}", path.read_bytes())


def get(folder: str, local: Path) -> None:
    """Downloads all files of `folder` to `local`; an OSError if that fails or there are none."""
    files = stamps(folder)
    if not files:
        raise FileNotFoundError(errno.ENOENT, f"{folder} has no files")
    get_files(folder, {name: local / name for name in files})


def get_files(
    folder: str, targets: Mapping[str, Path], done: Callable[[str], None] = lambda name: None
) -> None:
    """Downloads files, given as name in `folder` -> local path; calls `done(name)` after each.

    Each local file appears only when it is complete, and replaces an older one.

    Raises:
        OSError: a file could not be downloaded; some of the others may have been.
    """
    work = [(_get, f"{folder}/{name}".rstrip("/"), path) for name, path in targets.items()]
    names_of = {os.fspath(path): name for name, path in targets.items()}
    _at_once(work, lambda target: done(names_of[os.fspath(target)]))


def remove(folder: str, *, first: str = "") -> None:
    """Deletes a folder with all files, the file `first` ("": none) before all others.

    Raises:
        OSError: a file could not be deleted.
    """
    system, place = _system(folder)
    if first and holds(folder, first):
        _try(system.rm_file, f"{place}/{first}")
    if files := stamps(folder):
        _at_once([(system.rm_file, f"{place}/{name}".rstrip("/")) for name in files])
    if _try(system.exists, place):  # some stores have real folders, which remain
        _try(functools.partial(system.rm, recursive=True), place)


def remove_file(folder: str, name: str) -> None:
    """Deletes the file `name` in `folder`; raises an OSError if it fails or does not exist."""
    system, place = _system(folder)
    _try(system.rm_file, f"{place}/{name}")


def _system(address: str) -> tuple[Any, str]:
    """Returns the fsspec file system and the path in it; a ValueError if unusable."""
    scheme = address.partition("://")[0]
    if scheme not in LIBRARIES:
        known = ", ".join(f"{name}://" for name in LIBRARIES if name != "memory")
        raise ValueError(f"{address} cannot be used: known are {known}")
    import fsspec  # imported late: most commands use no store

    try:
        # Listings are not cached, because other processes write to the store too.
        system, place = fsspec.url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        how = f"pip install {LIBRARIES[scheme]}"
        raise ValueError(f"{address} cannot be used: {_words(error)} ({how})") from error
    except Exception as error:  # for example unreadable credentials
        raise ValueError(f"{address} cannot be used: {_words(error)}") from error
    return system, place.rstrip("/")


def _at_once(
    work: list[tuple[Any, ...]], done: Callable[[Any], None] = lambda target: None
) -> None:
    """Runs (function, *arguments) tuples in parallel; calls `done(last argument)` after each.

    Raises the first error; calls that have not started by then are cancelled.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        calls = {pool.submit(_try, *each): each[-1] for each in work}
        try:
            for call in as_completed(calls):
                call.result()
                done(calls[call])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _put(source: Path, target: str) -> None:
    system, place = _system(target)
    system.put_file(os.fspath(source), place)
    _compare(target, system.size(place), source.stat().st_size)


def _get(source: str, target: Path) -> None:
    system, place = _system(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        system.get_file(place, os.fspath(partial))
        _compare(source, partial.stat().st_size, system.size(place))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _compare(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise OSError(f"{name}: {found} bytes were copied, expected {wanted}")


def _try(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls `work` up to `TRIES` times; returns its result, or raises an OSError."""
    for number in range(1, TRIES + 1):
        try:
            return work(*arguments, **options)
        except Exception as error:  # each client has its own exception types
            if isinstance(error, FileNotFoundError):
                raise
            if number == TRIES or isinstance(error, PermissionError):
                where = next((each for each in reversed(arguments) if isinstance(each, str)), "")
                tries = f" ({number} tries)" if number > 1 else ""
                raise OSError(
                    getattr(error, "errno", None) or errno.EIO, f"{where}: {_words(error)}{tries}"
                ) from error
            time.sleep(PAUSE_SECONDS * 2 ** (number - 1))


def _stamp(facts: Mapping[str, Any]) -> str:
    return next((f"{name} {facts[name]}" for name in _STAMPS if facts.get(name)), "")


def _words(error: Exception) -> str:
    """Returns the first line of an error, preceded by its type if the line is a single word."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line if " " in line else f"{type(error).__name__} {line}".strip()
