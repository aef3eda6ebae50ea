"""Paths that may be store addresses: local paths are used as they are, others via local copies.

    input_path("gs://bucket/rows.jsonl")      an up-to-date copy of a file or folder
    input_checkpoint("s3://bucket/run")       a copy of a run without weights; `complete` adds them
    output_folder("s3://bucket/tuned")        a new folder, uploaded when it is complete
    growing_folder("gs://bucket/results")     a copy that is also uploaded while it grows

Copies are kept below `folder_of_copies()`; files that have not changed in the store are not copied
again. `training/workdir.py` does not use this module, because several machines write its runs.
"""

import contextlib
import hashlib
import json
import os
import posixpath
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from jax_instructblip import remote
from jax_instructblip.atomic import check_room, locked, refuse_existing
from jax_instructblip.files import local_path, read_json, scan_jsonl
from jax_instructblip.progress import count_bytes

VARIABLE = "JAX_INSTRUCTBLIP_STORES"  # names another folder of copies
INDEX, LOCK = "index.json", "lock"
LAST = "config.json"  # uploaded last: a folder of weights that has it is complete
PUSH_SECONDS = 60.0  # between two uploads of a growing folder

_CHECKPOINTS, _META = "checkpoints/", "meta.json"
_Stamps = dict[str, tuple[int, str]]


def folder_of_copies() -> Path:
    """Returns the folder of all local copies: that in the environment variable named `VARIABLE`.

    If the variable is not set, it is a folder in the user's cache. The folder need not exist.
    """
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).absolute()
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in containers
        cache = tempfile.gettempdir()
    return Path(cache, "jax_instructblip", "stores").absolute()


def input_path(path: str | os.PathLike, name: str = "the path") -> Path:
    """Returns the local path, or a current copy of the file or folder at an object-store address.

    `name` is the subject of error messages.

    Raises:
        ValueError: it is no path, or the store is unknown.
        FileNotFoundError: there is nothing at the address.
        OSError: the store does not answer, or the disk has too little room.
    """
    address = remote.address_of(path)
    return _fetch(address) if address else local_path(path, name)


def input_checkpoint(path: str | os.PathLike) -> Path:
    """Returns the local folder, or a copy of the checkpoint folder or run at an address.

    A run is copied without the weights of its checkpoints: call `complete` before reading one of
    them. Raises like `input_path`.
    """
    address = remote.address_of(path)
    if not address:
        return local_path(path, "the checkpoint")
    small = lambda name: not name.startswith(_CHECKPOINTS) or name.endswith(f"/{_META}")
    return _fetch(address, small)


def input_rows(path: str | os.PathLike, name: str = "the data") -> Path:
    """Returns the path of a JSON-lines file; for an address, a copy together with its images.

    The images are those that the lines name. Invalid lines are ignored here and reported by the
    reader. Another kind of path is treated as by `input_path`; `name` and errors are as there.
    """
    address = remote.address_of(path)
    if not address.endswith((".jsonl", ".json")):
        return input_path(path, name)
    folder, _, file = address.rpartition("/")
    copy = _fetch(folder, lambda name: name == file) / file
    if not copy.is_file():
        raise FileNotFoundError(f"{name} is {address}, which does not exist: check the address")
    images = _named_files(copy)
    _fetch(folder, lambda name: name == file or name in images)
    return copy


def complete(folder: Path) -> None:
    """Downloads the missing files of `folder`, a checkpoint within a copy of a run.

    Does nothing for a folder that is no part of a copy.
    """
    root = folder_of_copies()
    if not folder.absolute().is_relative_to(root):
        return
    home, _, *rest = folder.absolute().relative_to(root).parts
    index = read_json(root / home / INDEX, dict)
    below = "/".join(rest) + "/"
    _fetch(index["address"], lambda name: name in index["files"] or name.startswith(below))


def working_folder(address: str) -> Path:
    """Returns a local folder for data to be uploaded to `address`; it stays between runs."""
    home = _home(address) / "made"
    home.mkdir(parents=True, exist_ok=True)
    return home


@contextlib.contextmanager
def output_folder(
    out: str | os.PathLike, name: str = "out", last: str = LAST
) -> Iterator[tuple[Path, str]]:
    """Yields the path of a local folder to be made, and the name of `out` for messages.

    If `out` is an address, the folder is uploaded at the end of the block, `last` being the file
    that is uploaded last and marks the upload as complete. If the upload fails or is interrupted,
    the folder stays on the disk and its path is printed. `name` is the subject of error messages.

    Raises:
        FileExistsError: `out` exists already.
        ValueError: it is no path, or the store cannot be written to.
        OSError: the upload failed; the message names the complete local folder.
    """
    address = remote.address_of(out)
    if not address:
        path = local_path(out, name)
        refuse_existing(path)
        yield path, str(path)
        return
    remote.check(address)  # fails now, not after hours of work
    if remote.names(address):
        raise FileExistsError(
            f"{address} exists and is not overwritten: remove it, or choose another address"
        )
    folder_of_copies().mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="outgoing-", dir=folder_of_copies()))
    folder, whole = home / Path(address).name, False
    try:
        yield folder, address
        whole = folder.is_dir()
        if whole:
            send(folder, address, last)
    except KeyboardInterrupt:
        if whole:
            print(f"{address} was not written; it stands whole in {folder}", file=sys.stderr)
        raise
    except OSError as error:
        if not whole:
            raise
        raise OSError(
            error.errno,
            f"{address} was not written ({error.strerror}); it stands whole in {folder}",
        ) from error
    else:
        whole = False
    finally:
        if not whole:
            shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def growing_folder(out: str | os.PathLike, name: str = "out") -> Iterator[Path]:
    """Yields the local folder, or for an address a local copy, whose changes are uploaded.

    Uploads happen every minute and at the end of the block, even after an error. `name` is the
    subject of error messages.

    Raises:
        ValueError: it is no path, or the store cannot be written to.
        OSError: the last upload failed; the message names the local folder.
    """
    address = remote.address_of(out)
    if not address:
        yield local_path(out, name)
        return
    remote.check(address)
    copy = _fetch(address, absent=True)
    copy.mkdir(parents=True, exist_ok=True)
    # Files that an earlier run could not upload are uploaded too.
    there, state = remote.stamps(address), _state(copy)
    sent = {name: state[name] for name in state if there.get(name, (-1,))[0] == state[name][0]}
    ended = threading.Event()

    def push_now_and_then() -> None:
        nonlocal sent
        while not ended.wait(PUSH_SECONDS):
            with contextlib.suppress(OSError):  # only the last upload's error is raised
                sent = _push(copy, address, sent)

    pusher = threading.Thread(target=push_now_and_then, name="stores", daemon=True)
    pusher.start()
    try:
        yield copy
    finally:
        ended.set()
        pusher.join()
        try:
            _push(copy, address, sent)
        except OSError as error:
            raise OSError(
                error.errno, f"{address} lacks what was found last ({error.strerror}): see {copy}"
            ) from error
    print(f"copied to {address}", file=sys.stderr)


def _fetch(
    address: str, wanted: Callable[[str], bool] = lambda name: True, absent: bool = False
) -> Path:
    """Returns the local copy of an address; downloads new and changed files that are `wanted`.

    `wanted` gets a file's name. With `absent`, an empty address is no error.
    """
    home = _home(address)
    copy = home / address.rpartition("/")[2]
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / LOCK):  # processes of one machine share the copy
        there = remote.stamps(address)
        if not there and not absent:
            raise FileNotFoundError(f"{address} does not exist: check the address")
        if wrong := [name for name in there if ".." in Path(name).parts]:
            raise ValueError(f"{address} has files with names that lead out of it: {wrong}")
        cached: _Stamps = {}
        if (home / INDEX).is_file():
            entries = read_json(home / INDEX, dict)["files"]
            cached = {name: (entry[0], entry[1]) for name, entry in entries.items()}
        for name in cached.keys() - there.keys():
            (copy / name).unlink(missing_ok=True)
        cached = {
            name: stamp
            for name, stamp in cached.items()
            if there.get(name) == stamp and (copy / name if name else copy).is_file()
        }
        missing = {name: there[name] for name in there if wanted(name) and name not in cached}
        size = sum(stamp[0] for stamp in missing.values())
        check_room(home, size)
        try:
            with count_bytes(size, f"copying {address}") as count:

                def note(name: str) -> None:
                    cached[name] = missing[name]
                    count(missing[name][0])

                targets = {name: copy / name if name else copy for name in missing}
                remote.get_files(address, targets, note)
        finally:
            _write_index(home, address, cached)
    return copy


def _named_files(rows: Path) -> set[str]:
    """Returns the image paths in a JSON-lines file, relative to its folder."""
    names = set()
    for _, fields, _ in scan_jsonl(rows):
        if isinstance(fields, dict):
            many = fields.get("images")
            each = [fields.get("image"), *(many if isinstance(many, list) else [])]
            names |= {posixpath.normpath(name) for name in each if isinstance(name, str)}
    return names


def _home(address: str) -> Path:
    return folder_of_copies() / hashlib.sha256(address.encode()).hexdigest()[:16]


def _write_index(home: Path, address: str, cached: _Stamps) -> None:
    partial = home / f"{INDEX}.partial"
    partial.write_text(json.dumps({"address": address, "files": cached}))
    partial.replace(home / INDEX)


def send(folder: Path, address: str, last: str) -> None:
    """Uploads a folder to `address` as `remote.put` does, and prints its size to stderr.

    `last` is the file that is uploaded after all others, "" for none.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"copying {size / 1e6:,.1f} MB to {address}", file=sys.stderr, flush=True)
    remote.put(folder, address, last=last)


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns name -> (size, modification time) of every file below the folder."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def _push(
    folder: Path, address: str, sent: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """Uploads files changed since the state `sent`, deletes removed ones; returns the new state."""
    now = _state(folder)
    for name in now:
        if now[name] != sent.get(name):
            remote.put_file(folder / name, f"{address}/{name}".rpartition("/")[0])
    for name in sent.keys() - now.keys():
        with contextlib.suppress(FileNotFoundError):
            remote.remove_file(address, name)
    return now
