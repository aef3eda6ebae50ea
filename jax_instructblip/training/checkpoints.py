"""A run's checkpoints: saved in the background, whole or not at all, restored only where they fit.

checkpoints/
  3000/                 appears by renaming: a numbered folder is always complete
    meta.json           step, variant, frozen base, data cursor, score of the validation
    trainable/          the trained weights: `qformer/...`     (folders of `checkpoint/folder.py`)
    optimizer/          `step`, `rng`, `optimizer/...`          not needed for answering

In an object store, which knows no renaming, a folder is complete when `meta.json` is there: each is
written on the local disk first and then copied, that file last.

A process alone writes whole leaves, with Orbax. Of several, each writes and reads the parts that
its devices hold, and no other (`checkpoint/leaf_parts.py`, `shared_save.py`); either reads what
both wrote.
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
    """The folder `checkpoints/` of a run; one save at a time goes on in a thread.

    Old ones are removed after a save: the newest `keep` stay, the best by score, and with
    `keep_every` those whose step is a multiple of it. Several processes must all see the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 3,
        keep_every: int = 0,
        store: str = "",
    ):
        """`keep` is at least 1, `keep_every` 0 for none; the folder need not exist yet.

        With `store`, an address (`gs://bucket/run/checkpoints`), the checkpoints are there, and
        `folder` has those that are on their way.
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
        """The steps of all complete checkpoints, ascending."""
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
        """The newest step, as process 0 sees it (a shared folder may show up late); 0: none."""
        steps = self.steps() if jax.process_index() == 0 else []
        return int(multihost_utils.broadcast_one_to_all(np.int64(steps[-1] if steps else 0)))

    def path(self, step: int) -> Path:
        """The folder of that step on the disk."""
        return self.folder / str(step)

    def location(self, step: int) -> str:
        """The place where that step is kept, on the disk or elsewhere."""
        return f"{self._store or self.folder}/{step}"

    def meta(self, step: int) -> Meta:
        """The fields of that step's `meta.json`."""
        if not self._store:
            raw = (self.path(step) / META).read_bytes()
        else:
            raw = remote.read(self.location(step), META) or b""
        try:
            return parse_meta(raw, self.location(step))
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(f"{error}\n  {self._way_past(step)}") from error

    def best(self) -> int | None:
        """The step with the highest score, the later one of equals; None before any validation."""
        scores = {step: self.meta(step).get("score") for step in self.steps()}
        known = [(score, step) for step, score in scores.items() if score is not None]
        return max(known)[1] if known else None

    def check_room(self, state: TrainState) -> None:
        """Raises an OSError where the disk has no room for one checkpoint of such a state."""
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
        """Starts writing the checkpoint of `state.step`; returns when it is copied to the host.

        `then` is called when it is written, by the thread that writes, in one process.

        Every process calls it, with its part of the state. What an earlier save raised (a full
        disk) is raised here, in `check` or in `wait`. `meta` must have `variant`, `trainable`,
        `base` and `data`; `score` is what `best` compares.

        Raises:
            FileExistsError: the folder holds this step or a later one: of another run.
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
        """Copies the leaves of both parts; what is returned writes the copies."""
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
        """Copies this process's parts of the leaves; what is returned writes them.

        The first process then commits what all have written.
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
        """Raises what the save going on has raised, without waiting for it."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written; raises what the save raised."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def record_score(self, step: int, score: float) -> None:
        """Adds what a validation found to the checkpoint of that step, the newest.

        It may be the best now, and the best before it is then kept no longer. Every process calls
        it; it raises what the save has raised.
        """
        self.wait()
        if jax.process_index() == 0:
            self._saving = self._writer.submit(self._write_score, step, score)

    def close(self, wait: bool = True) -> None:
        """Lets the save going on end, and waits for that or not; what it raises is for `wait`."""
        self._writer.shutdown(wait=wait)

    def abandon(self) -> None:
        """Closes when another process has gone: its parts are waited for no longer."""
        self._ending.set()
        self.close()

    def restore(
        self, step: int, like: TrainState, rng: Array, meta: Meta
    ) -> tuple[TrainState, Array, Meta]:
        """State, random key and meta of that step, placed as the leaves of `like` are.

        `meta` is what the present run would save: its variant, trainable parts and base are
        compared first, then keys, shapes and dtypes, then the hash of every leaf. Of `like` shapes,
        dtypes and shardings are used. Of several processes each reads what its devices hold.
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
        """A hint for where that checkpoint is damaged."""
        before = [each for each in self.steps() if each < step]
        way = f"go on from step {before[-1]}" if before else "start over"
        return f"remove {self.location(step)} to {way}"

    def _upload(self, step: int) -> None:
        """Moves the checkpoint from the disk to the store."""
        try:
            remote.remove(self.location(step))  # what a killed process has left
            remote.put(self.path(step), self.location(step), last=META)
        finally:
            shutil.rmtree(self.path(step), ignore_errors=True)

    def _remove(self, step: int) -> None:
        if self._store:
            remote.remove(self.location(step), first=META)
            return
        # Renamed first: a removal cut short must not leave half a numbered folder.
        expired = self.folder / f".{step}.removed"
        shutil.rmtree(expired, ignore_errors=True)
        self.path(step).rename(expired)
        shutil.rmtree(expired, ignore_errors=True)

    def _complete_steps(self) -> str:
        """The complete steps, for a message; a store that fails may not even tell them."""
        try:
            return ", ".join(map(str, self.steps())) or "none"
        except Exception:
            return "all that were there before"


def is_writing() -> bool:
    """Tells whether a thread of this process is writing a checkpoint."""
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())


def is_step(name: str) -> bool:
    """Tells that a folder of this name is one of a checkpoint."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def _leaves(state: TrainState, rng: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """The leaves of each of `PARTS`, by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state.optimizer)
    rest = {_optimizer_path(path): leaf for path, leaf in flat}
    rest = {"step": state.step, "rng": jax.random.key_data(rng), **rest}
    return checkpoint.flatten(state.params), rest


def _read_leaves(folder: Path, like: Mapping[str, Array]) -> dict[str, Any]:
    """The leaves of a part, each on the devices where that of `like` lies."""

    def place(path: str, leaf: Any) -> Any:
        old = like[path]
        if path == "rng":  # lies wherever it is used
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
    """`optimizer/0/mu/qformer/queries`: names and positions of the optimizer's tuples and dicts."""
    return f"optimizer/{path_of(path)}"
