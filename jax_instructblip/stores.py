"""One door for paths: those of a disk as they are, addresses of a store by a copy on the disk.

    input_path("gs://bucket/rows.jsonl")      the copy of a file or a folder, brought up to date
    input_checkpoint("s3://bucket/run")       of a run: its small files; a step by `complete`
    output_folder("s3://bucket/tuned")        a new folder, copied to the store when it is whole
    growing_folder("gs://bucket/results")     one that is copied back, and to the store as it grows

Copies lie below `folder_of_copies()` and stay there: what has not changed in the store is not
copied again. Only `training/workdir.py`, whose runs are written by several machines, goes around.
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
LAST = "config.json"  # makes a folder of weights whole
PUSH_SECONDS = 60.0  # between two copies of a folder that grows

_CHECKPOINTS, _META = "checkpoints/", "meta.json"
_Stamps = dict[str, tuple[int, str]]


def folder_of_copies() -> Path:
    """The folder of all copies: of the environment, else in the user's cache."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).absolute()
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in containers
        cache = tempfile.gettempdir()
    return Path(cache, "jax_instructblip", "stores").absolute()


def input_path(path: str | os.PathLike, name: str = "the path") -> Path:
    """The path itself, or the copy of the file or folder at an address, which `name` is said of.

    Raises:
        ValueError: it is no path, or of no store that is known.
        FileNotFoundError: there is nothing at the address.
        OSError: the store does not answer, or the disk has too little room.
    """
    address = remote.address_of(path)
    return _fetch(address) if address else local_path(path, name)


def input_checkpoint(path: str | os.PathLike) -> Path:
    """The folder itself, or a copy: whole, but of a run without its checkpoints' weights.

    Raises as `input_path`. Whoever reads a checkpoint of the run calls `complete` before.
    """
    address = remote.address_of(path)
    if not address:
        return local_path(path, "the checkpoint")
    small = lambda name: not name.startswith(_CHECKPOINTS) or name.endswith(f"/{_META}")
    return _fetch(address, small)


def input_rows(path: str | os.PathLike, name: str = "the data") -> Path:
    """The path of a file of JSON lines; of an address with the images that its lines name.

    Raises as `input_path`. What is wrong with a line is left to whoever reads the file.
    """
    address = remote.address_of(path)
    if not address.endswith((".jsonl", ".json")):
        return input_path(path, name)
    folder, _, file = address.rpartition("/")
    copy = _fetch(folder, lambda name: name == file) / file
    if not copy.is_file():
        raise FileNotFoundError(f"{name} is {address}, and there is no such file")
    images = _named_files(copy)
    _fetch(folder, lambda name: name == file or name in images)
    return copy


def complete(folder: Path) -> None:
    """Copies what is lacking of a folder inside a copy; nothing is done for any other folder."""
    root = folder_of_copies()
    if not folder.absolute().is_relative_to(root):
        return
    home, _, *rest = folder.absolute().relative_to(root).parts
    index = read_json(root / home / INDEX, dict)
    below = "/".join(rest) + "/"
    _fetch(index["address"], lambda name: name in index["files"] or name.startswith(below))


def working_folder(address: str) -> Path:
    """A folder of the disk for what is made for that address; it stays between runs."""
    home = _home(address) / "made"
    home.mkdir(parents=True, exist_ok=True)
    return home


@contextlib.contextmanager
def output_folder(
    out: str | os.PathLike, name: str = "out", last: str = LAST
) -> Iterator[tuple[Path, str]]:
    """Yields a folder to make, and what to call it; at an address it appears when it is whole.

    `last` is the file that makes it whole. Where copying fails or is interrupted, the folder stays
    on the disk, and its place is said.

    Raises:
        FileExistsError: there is something already.
        ValueError: it is no path, or the store cannot be written to.
        OSError: it could not be copied; the message names the folder that is whole.
    """
    address = remote.address_of(out)
    if not address:
        path = local_path(out, name)
        refuse_existing(path)
        yield path, str(path)
        return
    remote.check(address)  # before hours of work
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
    """Yields the folder, or a copy of what is at the address, which goes there as it grows.

    Every minute, and when the block ends, with an error too.

    Raises:
        ValueError: it is no path, or the store cannot be written to.
        OSError: it could not be copied at the end; the message names the folder on the disk.
    """
    address = remote.address_of(out)
    if not address:
        yield local_path(out, name)
        return
    remote.check(address)
    copy = _fetch(address, absent=True)
    copy.mkdir(parents=True, exist_ok=True)
    # What a run before could not copy goes there, too.
    there, state = remote.stamps(address), _state(copy)
    sent = {name: state[name] for name in state if there.get(name, (-1,))[0] == state[name][0]}
    ended = threading.Event()

    def push_now_and_then() -> None:
        nonlocal sent
        while not ended.wait(PUSH_SECONDS):
            with contextlib.suppress(OSError):  # the last one is reported
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
    """The copy of what is at the address: files whose names are wanted, as they are there now.

    `absent` allows that there is nothing.
    """
    home = _home(address)
    copy = home / address.rpartition("/")[2]
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / LOCK):  # processes of one machine share the copy
        there = remote.stamps(address)
        if not there and not absent:
            raise FileNotFoundError(f"there is nothing at {address}")
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
    """The names of images in a file of JSON lines, as they are below its folder."""
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
    """Copies a folder to the address, the file named `last` after all others; raises OSError."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"copying {size / 1e6:,.1f} MB to {address}", file=sys.stderr, flush=True)
    remote.put(folder, address, last=last)


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file, by its name below the folder."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def _push(
    folder: Path, address: str, sent: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """Copies what has changed since `sent`, removes what has gone; the state that is there now."""
    now = _state(folder)
    for name in now:
        if now[name] != sent.get(name):
            remote.put_file(folder / name, f"{address}/{name}".rpartition("/")[0])
    for name in sent.keys() - now.keys():
        with contextlib.suppress(FileNotFoundError):
            remote.remove_file(address, name)
    return now
