"""A checkpoint written by several processes: each writes its own shards, then process 0 commits.

checkpoints/
  .3000.part-TOKEN-1/     by process 1: `trainable/`, `optimizer/`; written last: done-TOKEN-1.json
  3000/                   when all are done, process 0 joins their files and renames the folder

In an object store each process uploads its files to `3000/`, and process 0 adds `meta.json` last.
The processes wait for each other by these files only: the writer thread must not run JAX
collectives while the main thread trains.
"""

import contextlib
import errno
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jax_instructblip import remote
from jax_instructblip.atomic import atomic_folder, write_file
from jax_instructblip.checkpoint import PARAMS, leaf_parts
from jax_instructblip.checkpoint.file_hashes import write_hashes
from jax_instructblip.checkpoint.leaf_parts import OwnPart
from jax_instructblip.checkpoint.manifest import MANIFEST
from jax_instructblip.checkpoint.step_meta import META, bind, seal
from jax_instructblip.files import parse_json, read_json

POLL_SECONDS = 0.05  # between looks for the other processes' files on a disk
POLL_STORE_SECONDS = 1.0
GRACE_SECONDS = 10.0  # after a process has died: give up if no file grows for so long

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


class SharedSave:
    """The save of one step's checkpoint, as done by this process."""

    def __init__(self, folder: Path, store: str, step: int, token: str, ending: threading.Event):
        """Sets up the save of `step`.

        `folder` is the run's `checkpoints/`: one that all processes see if `store` is "", a local
        one of each process if `store` is the object-store address of the checkpoints. `token` is
        equal in all processes and different in each run. `ending` is set after another process has
        died; its missing files then soon become an error.
        """
        self._folder, self._step, self._token, self._ending = folder, step, token, ending
        self._store = f"{store}/{step}" if store else ""

    def write(self, own: Mapping[str, Iterable[OwnPart]]) -> None:
        """Writes this process's shards; raises an OSError if it cannot.

        `own` has the shards (`leaf_parts.OwnPart`) of `trainable` and of `optimizer`.
        """
        index = jax.process_index()
        mine = self._part_folder(index)
        mine.mkdir(parents=True)
        try:
            manifests = {
                name: leaf_parts.write_parts(mine / name / PARAMS, parts)
                for name, parts in own.items()
            }
            write_file(mine / self._done(index), json.dumps(manifests))
            if self._store:
                remote.put(mine, self._store, last=self._done(index))
        except BaseException:
            shutil.rmtree(mine, ignore_errors=True)
            raise
        if self._store:
            shutil.rmtree(mine, ignore_errors=True)

    def commit(self, shapes: Shapes, meta: Mapping[str, Any]) -> None:
        """Waits for all processes and merges their files into one checkpoint; process 0 only.

        `shapes` are the full leaf shapes, by part (`trainable`, `optimizer`) and then by the leaf's
        path; `meta` becomes `meta.json`. Raises an OSError if files do not arrive.
        """
        count = jax.process_count()
        self._await(count)
        manifests = [self._manifests(index) for index in range(count)]
        merged = {
            name: leaf_parts.merge([each[name] for each in manifests], leaves)
            for name, leaves in shapes.items()
        }
        if self._store:
            self._commit_store(merged, meta)
            return
        with atomic_folder(self._folder / str(self._step)) as partial:
            for index in range(count):
                for name in merged:
                    _move(self._part_folder(index) / name, partial / name)
            _write_lists(partial, merged, meta)
        for index in range(count):
            shutil.rmtree(self._part_folder(index), ignore_errors=True)

    def _commit_store(self, merged: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as lists:
            _write_lists(Path(lists), merged, meta)
            for index in range(jax.process_count()):
                remote.remove_file(self._store, self._done(index))
            remote.put(Path(lists), self._store, last=META)

    def _await(self, count: int) -> None:
        """Waits until all `count` processes have written their files; OSError after a death."""
        size, limit = -1, float("inf")
        while absent := [index for index in range(count) if not self._is_done(index)]:
            before, size = size, sum(map(self._size, absent)) if self._ending.is_set() else -1
            if size != before:
                limit = time.monotonic() + GRACE_SECONDS
            if self._ending.is_set() and time.monotonic() > limit:
                names = ", ".join(map(str, absent))
                raise OSError(
                    errno.EIO,
                    f"the parts of process {names} did not come: a process was lost, and for "
                    f"{GRACE_SECONDS:g} seconds no file has grown",
                )
            time.sleep(POLL_STORE_SECONDS if self._store else POLL_SECONDS)

    def _is_done(self, index: int) -> bool:
        if self._store:
            return remote.holds(self._store, self._done(index))
        return (self._part_folder(index) / self._done(index)).is_file()

    def _size(self, index: int) -> int:
        """Returns the bytes that process `index` has written so far; 0 if not visible here."""
        size = 0
        for path in self._part_folder(index).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a temporary file was just renamed
                size += path.stat().st_size
        return size

    def _manifests(self, index: int) -> dict[str, leaf_parts.Manifest]:
        if self._store:
            return parse_json(remote.read(self._store, self._done(index)) or b"")
        return read_json(self._part_folder(index) / self._done(index), dict)

    def _part_folder(self, index: int) -> Path:
        return self._folder / f".{self._step}.part-{self._token}-{index}"

    def _done(self, index: int) -> str:
        return f"done-{self._token}-{index}.json"


def remove_parts(folder: Path) -> None:
    """Deletes the files that killed saves left in `folder`, a run's `checkpoints/`.

    It must not be called while a save is running.
    """
    for left in folder.glob(".*.part-*"):
        shutil.rmtree(left, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            destination = target / path.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            path.rename(destination)


def _write_lists(folder: Path, merged: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Writes the manifest and hashes of each part, and `meta.json`."""
    for name, manifest in merged.items():
        (folder / name).mkdir(exist_ok=True)
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        (folder / name / MANIFEST).write_text(text)
        write_hashes(folder / name)
    (folder / META).write_text(seal(bind(meta, folder, tuple(merged))))
