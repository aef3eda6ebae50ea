"""Files of an object store (`gs://`, `s3://`, `az://`), by its official client through fsspec.

A store puts a file whole or not at all, but knows no renaming of folders and no appending. So a
folder is complete when one file of it is there, which is put last and removed first.
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

# Stores by scheme, each with the package of its client; memory:// lives as long as the process.
LIBRARIES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "memory": "fsspec"}
TRIES = 3  # of each file: stores fail now and then
AT_ONCE = 16  # files on their way: a store takes a tenth of a second for the smallest
PAUSE_SECONDS = 1.0  # after the first failure; twice as long after the next one

# What `pathlib` and shells make of an address is one, too: `s3:/bucket`, `./s3:/bucket`.
_ADDRESS = re.compile(r"(?:\./)*(?P<scheme>gs|gcs|s3|az|memory):/{1,2}(?P<rest>[^/].*)", re.I)
_STAMPS = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "created")


def address_of(path: object) -> str:
    """The address (`gs://bucket/run`) that this is, without a slash at its end; "" for a path."""
    match = _ADDRESS.fullmatch(os.fspath(path)) if isinstance(path, str | os.PathLike) else None
    if match is None:
        return ""
    scheme = match["scheme"].lower().replace("gcs", "gs")
    return f"{scheme}://{match['rest'].rstrip('/')}"


def is_remote(path: object) -> bool:
    """Tells whether it is an address of a store and no path of a disk."""
    return bool(address_of(path))


def check(folder: str) -> None:
    """Raises a ValueError, with what to do, where the folder cannot be written to and read."""
    system, place = _system(folder)
    probe = f"{place}/.probe-{uuid.uuid4().hex}"
    try:
        system.pipe_file(probe, b"probe")
        content = system.cat_file(probe)
        system.rm_file(probe)
    except Exception as error:  # each store has errors of its own
        raise ValueError(
            f"{folder} cannot be written to: {_words(error)}; is the bucket's name right, and may "
            "this machine write there?"
        ) from error
    if content != b"probe":
        raise ValueError(f"{folder} gives back other bytes than were written to it")


def names(folder: str) -> list[str]:
    """The names of what is in the folder; none where it is not there."""
    system, place = _system(folder)
    try:
        listed = _try(system.ls, place, detail=False)
    except FileNotFoundError:
        return []
    return sorted({name.rstrip("/").rpartition("/")[2] for name in listed})


def stamps(address: str) -> dict[str, tuple[int, str]]:
    """Size and a text that changes with the content of each file below the address, by its name.

    Names are relative; the file that the address itself is has the name "". {}: nothing is there.
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
    """Tells whether there is that file in the folder."""
    system, place = _system(folder)
    return bool(_try(system.exists, f"{place}/{name}"))


def read(folder: str, name: str) -> bytes | None:
    """The bytes of that file; None where it is not there."""
    system, place = _system(folder)
    try:
        return _try(system.cat_file, f"{place}/{name}")
    except FileNotFoundError:
        return None


def put(local: Path, folder: str, *, last: str = "") -> None:
    """Copies all files below `local` into the folder, the one named `last` after all others.

    Raises:
        OSError: a file could not be copied; `last` is not there then.
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
    """Copies that file, which may grow meanwhile, into the folder; raises OSError."""
    system, place = _system(folder)
    _try(system.pipe_file, f"{place}/{path.name}", path.read_bytes())


def get(folder: str, local: Path) -> None:
    """Copies all files of the folder below `local`; raises OSError, also where there are none."""
    files = stamps(folder)
    if not files:
        raise FileNotFoundError(errno.ENOENT, f"{folder} has no files")
    get_files(folder, {name: local / name for name in files})


def get_files(
    folder: str, targets: Mapping[str, Path], done: Callable[[str], None] = lambda name: None
) -> None:
    """Copies files by their names in the folder; each appears whole, and `done(name)` follows.

    Raises:
        OSError: a file could not be copied; of the others some may be there.
    """
    work = [(_get, f"{folder}/{name}".rstrip("/"), path) for name, path in targets.items()]
    names_of = {os.fspath(path): name for name, path in targets.items()}
    _at_once(work, lambda target: done(names_of[os.fspath(target)]))


def remove(folder: str, *, first: str = "") -> None:
    """Removes the folder, that file before all others; raises OSError."""
    system, place = _system(folder)
    if first and holds(folder, first):
        _try(system.rm_file, f"{place}/{first}")
    if files := stamps(folder):
        _at_once([(system.rm_file, f"{place}/{name}".rstrip("/")) for name in files])
    if _try(system.exists, place):  # where folders are more than parts of names
        _try(functools.partial(system.rm, recursive=True), place)


def remove_file(folder: str, name: str) -> None:
    """Removes that file; raises OSError, also where it is not there."""
    system, place = _system(folder)
    _try(system.rm_file, f"{place}/{name}")


def _system(address: str) -> tuple[Any, str]:
    """The client of the store, and the place in its own words; ValueError where there is none."""
    scheme = address.partition("://")[0]
    if scheme not in LIBRARIES:
        known = ", ".join(f"{name}://" for name in LIBRARIES if name != "memory")
        raise ValueError(f"{address} cannot be used: known are {known}")
    import fsspec  # late: most commands meet no store

    try:
        # Listings are not kept: other processes write there, too.
        system, place = fsspec.url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        how = f"pip install {LIBRARIES[scheme]}"
        raise ValueError(f"{address} cannot be used: {_words(error)} ({how})") from error
    except Exception as error:  # of credentials that cannot be read, for one
        raise ValueError(f"{address} cannot be used: {_words(error)}") from error
    return system, place.rstrip("/")


def _at_once(
    work: list[tuple[Any, ...]], done: Callable[[Any], None] = lambda target: None
) -> None:
    """Calls (function, *arguments) some at a time; `done(last argument)` after each that ended.

    Raises the first OSError; what has not begun by then is left out.
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
    """The result of `work`, tried `TRIES` times; an OSError where all fail."""
    for number in range(1, TRIES + 1):
        try:
            return work(*arguments, **options)
        except Exception as error:  # each store has errors of its own
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
    """The first line of an error, with the error's name where that is an address or nothing."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line if " " in line else f"{type(error).__name__} {line}".strip()
