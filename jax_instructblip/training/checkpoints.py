"""Checkpoints of a training run: saved in the background, each one either complete or absent.

checkpoints/
  3000/                 one folder per saved step, renamed into place only when complete
    meta.json           step, variant (model sizes), frozen base, data cursor, validation score
    trainable/          the trained weights: `qformer/...`     (layout: `checkpoint/folder.py`)
    optimizer/          `step`, `rng`, `optimizer/...`          needed only to resume training

An object store has no renaming. There a folder is complete once it holds `meta.json`: a checkpoint
is written to the local disk first and then uploaded, `meta.json` last.

A single process writes whole leaves with Orbax. In a multi-process run each process writes and
reads only the shards on its own devices (`checkpoint/leaf_parts.py`, `shared_save.py`). A run of
any number of processes can read both layouts.
"""

import dataclasses
import errno
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from jax_instructblip import checkpoint, remote
from jax_instructblip.atomic import atomic_folder, free_bytes, write_file
from jax_instructblip.checkpoint.leaf_parts import OwnPart, own_parts
from jax_instructblip.checkpoint.step_meta import (
    FORMAT,
    META,
    bind,
    check_manifest,
    parse_meta,
    seal,
)
from jax_instructblip.parallel.cluster import agree
from jax_instructblip.parallel.rules import path_of
from jax_instructblip.training.host_copy import copy_to_host
from jax_instructblip.training.run_meta import Meta, compare_meta
from jax_instructblip.training.shared_save import SharedSave
from jax_instructblip.training.state import TrainState

PARTS: tuple[str, ...] = ("trainable", "optimizer")
THREAD = "checkpoint"


class Checkpoints:
    """The folder `checkpoints/` of a run; one background thread writes at most one save at a time.

    After each save, old checkpoints are deleted except the newest `keep`, the one with the best
    validation score and, if `keep_every` > 0, steps that are multiples of `keep_every`. In a
    multi-process run all processes must share the folder or the store.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 3,
        keep_every: int = 0,
        store: str = "",
    ):
        """Sets up the folder, which need not exist yet.

        `keep` is at least 1; `keep_every` 0 turns that rule off. `store` is an object store address
        (`gs://bucket/run/checkpoints`): if set, checkpoints are kept there, and `folder` only
        buffers those that are being uploaded.
        """
        if keep < 1 or keep_every < 0:
            raise ValueError(
                f"keep is {keep}, expected at least 1; keep_every {keep_every}, expected 0 or more"
            )
        self.folder, self._store = Path(folder), store
        self._keep, self._keep_every = keep, keep_every
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=THREAD)
        self._saving: Future | None = None
        self._snapshot: dict[str, dict[Any, np.ndarray]] = {part: {} for part in PARTS}
        self._token, self._ending = "", threading.Event()

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending."""
        if self._store:
            numbers = [name for name in remote.names(self._store) if is_step(name)]
            committed = [name for name in numbers if remote.holds(self.location(int(name)), META)]
        elif self.folder.is_dir():
            names = [path.name for path in self.folder.iterdir() if (path / META).is_file()]
            committed = [name for name in names if is_step(name)]
        else:
            committed = []
        return sorted(map(int, committed))

    def newest(self) -> int:
        """Returns the newest saved step as process 0 sees it, 0 if none; all processes call it."""
        steps = self.steps() if jax.process_index() == 0 else []
        return int(multihost_utils.broadcast_one_to_all(np.int64(steps[-1] if steps else 0)))

    def path(self, step: int) -> Path:
        """Returns the local folder of the checkpoint of `step`, which need not exist."""
        return self.folder / str(step)

    def location(self, step: int) -> str:
        """Returns the path or object-store address where the checkpoint of `step` is kept."""
        return f"{self._store or self.folder}/{step}"

    def meta(self, step: int) -> Meta:
        """Returns `meta.json` of the checkpoint of `step`; a CheckpointError if it is damaged."""
        if not self._store:
            raw = (self.path(step) / META).read_bytes()
        else:
            raw = remote.read(self.location(step), META) or b""
        try:
            return parse_meta(raw, self.location(step))
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(f"{error}\n  {self._way_past(step)}") from error

    def best(self) -> int | None:
        """Returns the step with the best validation score (latest on a tie); None without any."""
        scores = {step: self.meta(step).get("score") for step in self.steps()}
        known = [(score, step) for step, score in scores.items() if score is not None]
        return max(known)[1] if known else None

    def check_room(self, state: TrainState) -> None:
        """Raises an OSError if the disk has too little free space for one checkpoint of `state`."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = free_bytes(self.folder)
        if jax.process_index() == 0 and free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{self.folder}: a checkpoint takes {needed / 1e6:,.2f} MB, {free / 1e6:,.2f} MB "
                "are free: make room, or choose another config.workdir",
            )

    def save(
        self,
        state: TrainState,
        rng: Array,
        meta: Meta,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts saving the checkpoint of `state.step`; returns once `state` is in host memory.

        Every process calls it with its shards of the state. After the files are written, the writer
        thread of process 0 calls `then`. An error of the background write (a full disk) is raised
        by the next `save`, `check` or `wait`. `rng` is the run's random key. `meta` must have the
        keys `variant`, `trainable`, `base` and `data`; `best` reads its optional `score`.

        Raises:
            FileExistsError: the folder has this step or a later one, so another run wrote it.
        """
        self.wait()
        step = int(state.step)
        if later := [each for each in self.steps() if each >= step]:
            raise FileExistsError(
                f"{self._store or self.folder} holds the checkpoints {later}, made by another run "
                f"than the one at step {step}: choose another workdir"
            )
        meta = {"format": FORMAT, "step": step, "score": None} | meta
        parts: dict[str, dict[str, Array]] = dict(zip(PARTS, _leaves(state, rng), strict=True))
        if jax.process_count() == 1:
            write = self._prepare_alone(step, parts, meta)
        else:
            write = self._prepare_shared(step, parts, meta)
        self._saving = self._writer.submit(self._write, step, write, then)

    def _prepare_alone(
        self, step: int, parts: Mapping[str, Mapping[str, Array]], meta: Meta
    ) -> Callable[[], None]:
        """Copies all leaves to host memory; returns the function that writes these copies."""
        copies = {
            part: copy_to_host(leaves, self._snapshot[part]) for part, leaves in parts.items()
        }

        def write() -> None:
            with atomic_folder(self.path(step)) as partial:
                for part, leaves in copies.items():
                    checkpoint.write_tree(partial / part, leaves.items())
                (partial / META).write_text(seal(bind(meta, partial, PARTS)))
            if self._store:
                self._upload(step)

        return write

    def _prepare_shared(
        self, step: int, parts: Mapping[str, Mapping[str, Array]], meta: Meta
    ) -> Callable[[], None]:
        """Copies this process's shards to host memory; returns the function that writes the copies.

        On process 0 that function also merges the files of all processes into the checkpoint.
        """
        if not self._token:
            number = np.int64(secrets.randbits(62))
            self._token = f"{int(multihost_utils.broadcast_one_to_all(number)):x}"
        own: dict[str, list[OwnPart]] = {}
        for part, leaves in parts.items():
            here = {(each.path, each.name): each for each in own_parts(leaves)}
            arrays = {key: each.data for key, each in here.items()}
            copies = copy_to_host(arrays, self._snapshot[part])
            own[part] = [dataclasses.replace(here[key], data=copies[key]) for key in here]
        shapes = {
            part: {path: leaf.shape for path, leaf in leaves.items()}
            for part, leaves in parts.items()
        }
        shared = SharedSave(self.folder, self._store, step, self._token, self._ending)

        def write() -> None:
            shared.write(own)
            if jax.process_index() == 0:
                shared.commit(shapes, meta)

        return write

    def check(self) -> None:
        """Raises the error of the background save if it has already failed; does not wait."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the background save is finished; raises its error if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def record_score(self, step: int, score: float) -> None:
        """Starts adding a validation score to `meta.json` of the checkpoint of `step`, the newest.

        Deletes old checkpoints afterwards, because the best one may have changed. Every process
        calls it. It waits for the save before it, and raises the error of that save.
        """
        self.wait()
        if jax.process_index() == 0:
            self._saving = self._writer.submit(self._write_score, step, score)

    def close(self, wait: bool = True) -> None:
        """Stops accepting saves; with `wait`, waits for the running one. Never raises its error."""
        self._writer.shutdown(wait=wait)

    def abandon(self) -> None:
        """Closes after another process has died: the save stops waiting for its files."""
        self._ending.set()
        self.close()

    def restore(
        self, step: int, like: TrainState, rng: Array, meta: Meta
    ) -> tuple[TrainState, Array, Meta]:
        """Returns state, random key and meta of the checkpoint of `step`, sharded like `like`.

        `like` and `rng` give only shapes, dtypes, shardings and the key type. `meta` is what the
        current run would save: variant, trainable parts and base must equal the stored ones. Each
        process reads only the shards of its own devices, and checks their hashes.

        Raises:
            CheckpointError: a file is damaged, or of another model or base.
            OSError: a file cannot be read.
        """
        stored = self.meta(step)
        compare_meta(self.location(step), stored, meta)
        read, problem = {}, None
        try:
            if self._store:
                remote.get(self.location(step), self.path(step))
            for part, leaves in zip(PARTS, _leaves(like, rng), strict=True):
                check_manifest(stored, self.path(step), part)
                read[part] = _read_leaves(self.path(step) / part, leaves)
        except OSError as error:
            problem = error
        except ValueError as error:
            problem = checkpoint.CheckpointError(f"{error}\n  {self._way_past(step)}")
            problem.__cause__ = error
        finally:
            if self._store:
                shutil.rmtree(self.path(step), ignore_errors=True)
        agree(problem)
        trainable, rest = (read[part] for part in PARTS)
        flat, treedef = jax.tree_util.tree_flatten_with_path(like.optimizer)
        state = TrainState(
            rest["step"],
            checkpoint.unflatten(trainable),
            jax.tree_util.tree_unflatten(
                treedef, [rest[_optimizer_path(path)] for path, _ in flat]
            ),
        )
        key = jax.random.wrap_key_data(jnp.asarray(rest["rng"]), impl=jax.random.key_impl(rng))
        return state, key, stored

    def _write(self, step: int, write: Callable[[], None], then: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            hint = "When the store answers" if self._store else "With room made there"
            raise OSError(
                error.errno or errno.EIO,
                f"the checkpoint of step {step} was not saved ({error.strerror or error}); intact "
                f"in {self._store or self.folder}: {self._complete_steps()}. {hint}, start the run "
                "again",
            ) from error
        if jax.process_index() == 0:
            self._remove_old()
            then()

    def _write_score(self, step: int, score: float) -> None:
        text = seal(self.meta(step) | {"score": score})
        path = self.path(step) / META
        if self._store:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
        if self._store:
            try:
                remote.put_file(path, self.location(step))
            finally:
                shutil.rmtree(path.parent, ignore_errors=True)
        self._remove_old()

    def _remove_old(self) -> None:
        keep = {*self.steps()[-self._keep :], self.best()}
        for old in self.steps():
            if old not in keep and not (self._keep_every and old % self._keep_every == 0):
                self._remove(old)

    def _way_past(self, step: int) -> str:
        """Returns advice for a damaged checkpoint: remove it, and which step is then resumed."""
        before = [each for each in self.steps() if each < step]
        way = f"go on from step {before[-1]}" if before else "start over"
        return f"remove {self.location(step)} to {way}"

    def _upload(self, step: int) -> None:
        """Uploads the local checkpoint of `step` to the object store; deletes the local files."""
        try:
            remote.remove(self.location(step))  # leftovers of a killed process
            remote.put(self.path(step), self.location(step), last=META)
        finally:
            shutil.rmtree(self.path(step), ignore_errors=True)

    def _remove(self, step: int) -> None:
        if self._store:
            remote.remove(self.location(step), first=META)
            return
        # Renamed first: an interrupted deletion must not leave half a numbered folder.
        expired = self.folder / f".{step}.removed"
        shutil.rmtree(expired, ignore_errors=True)
        self.path(step).rename(expired)
        shutil.rmtree(expired, ignore_errors=True)

    def _complete_steps(self) -> str:
        """Lists the complete steps for an error message; does not fail when the store is down."""
        try:
            return ", ".join(map(str, self.steps())) or "none"
        except Exception:
            return "all that were there before"


def is_writing() -> bool:
    """Returns True while a thread of this process is writing a checkpoint."""
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())


def is_step(name: str) -> bool:
    """Returns True if `name` is a checkpoint's folder name: a step without leading zeros."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def _leaves(state: TrainState, rng: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns two dicts from path to leaf, in the order of `PARTS`: trainable and optimizer."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state.optimizer)
    rest = {_optimizer_path(path): leaf for path, leaf in flat}
    rest = {"step": state.step, "rng": jax.random.key_data(rng), **rest}
    return checkpoint.flatten(state.params), rest


def _read_leaves(folder: Path, like: Mapping[str, Array]) -> dict[str, Any]:
    """Reads the leaves of one part by path, each sharded as `like` is at the same path."""

    def place(path: str, leaf: Any) -> Any:
        old = like[path]
        if path == "rng":  # has no fixed sharding: a host array
            return np.asarray(leaf[...])
        part = lambda index: np.asarray(leaf[index])
        return jax.make_array_from_callback(old.shape, old.sharding, part)

    kwargs: dict[str, Any] = {"expected": checkpoint.unflatten(like), "strict_dtype": True}
    kwargs["place"] = place
    if jax.process_count() == 1:
        return checkpoint.flatten(checkpoint.read_tree(folder, **kwargs))
    share = {"process": jax.process_index(), "processes": jax.process_count()}
    return checkpoint.flatten(checkpoint.read_parts(folder, **share, **kwargs))


def _optimizer_path(path: tuple[Any, ...]) -> str:
    """Returns the file path of an optimizer leaf, such as `optimizer/0/mu/qformer/queries`."""
    return f"optimizer/{path_of(path)}"
