"""A checkpoint that several processes write together: each its own parts, then the first commits.

checkpoints/
  .3000.part-TOKEN-1/     of process 1: `trainable/`, `optimizer/`; at the end done-TOKEN-1.json
  3000/                   when all have ended, process 0 moves the files together, and renames

In a store each puts its parts into `3000/`, and process 0 `meta.json`, at the end. The processes
meet through these files alone: a thread that saves cannot take part in collectives.
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

POLL_SECONDS = 0.05  # on a disk
POLL_STORE_SECONDS = 1.0
GRACE_SECONDS = 10.0  # in which some part must have grown, when a process has gone

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


class SharedSave:
    """The save of one step, by this process among all."""

    def __init__(self, folder: Path, store: str, step: int, token: str, ending: threading.Event):
        """`token` is the same in all processes, and another one in each run.

        `folder` is seen by all processes, or, with `store`, each has one of its own. `ending` is
        set when a process has gone: parts that do not come then are waited for no longer.
        """
        self._folder, self._step, self._token, self._ending = folder, step, token, ending
        self._store = f"{store}/{step}" if store else ""

    def write(self, own: Mapping[str, Iterable[OwnPart]]) -> None:
        """Writes the parts of this process, of `trainable` and `optimizer`; raises OSError."""
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
        """Makes one checkpoint of what all processes write; raises OSError."""
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
        """Returns when all processes have written their parts."""
        size, limit = -1, float("inf")
        while absent := [index for index in range(count) if not self._is_done(index)]:
            before, size = size, sum(map(self._size, absent)) if self._ending.is_set() else -1
            if size != before:
                limit = time.monotonic() + GRACE_SECONDS
            if self._ending.is_set() and time.monotonic() > limit:
                names = ", ".join(map(str, absent))
                raise OSError(errno.EIO, f"the parts of process {names} did not come")
            time.sleep(POLL_STORE_SECONDS if self._store else POLL_SECONDS)

    def _is_done(self, index: int) -> bool:
        if self._store:
            return remote.holds(self._store, self._done(index))
        return (self._part_folder(index) / self._done(index)).is_file()

    def _size(self, index: int) -> int:
        """The bytes that a process has written so far, where that can be seen."""
        size = 0
        for path in self._part_folder(index).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # it has its last name now
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
    """Removes the parts of saves that a kill has ended; no save must be going on."""
    for left in folder.glob(".*.part-*"):
        shutil.rmtree(left, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            destination = target / path.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            path.rename(destination)


def _write_lists(folder: Path, merged: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Writes what belongs to the parts: their manifests, and `meta.json`."""
    for name, manifest in merged.items():
        (folder / name).mkdir(exist_ok=True)
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        (folder / name / MANIFEST).write_text(text)
        write_hashes(folder / name)
    (folder / META).write_text(seal(bind(meta, folder, tuple(merged))))
