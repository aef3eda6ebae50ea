"""A run's checkpoints: saved in the background, whole or not at all, restored only where they fit.

checkpoints/
  3000/                 appears by renaming: a numbered folder is always complete
    meta.json           step, variant, frozen base, data cursor, score of the validation
    trainable/          the trained weights: `qformer/...`     (folders of `checkpoint.py`)
    optimizer/          `step`, `rng`, `optimizer/...`          not needed for answering

In an object store, which knows no renaming, a folder is complete when `meta.json` is there: each is
written on the local disk first and then copied, that file last.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from jax_instructblip import checkpoint, remote
from jax_instructblip.folders import free_bytes, write_file
from jax_instructblip.step_meta import (
    FORMAT,
    META,
    bind,
    check_manifest,
    parse_meta,
    seal,
)
from jax_instructblip.training.run_meta import Meta, compare_meta
from jax_instructblip.training.state import TrainState

PARTS = ("trainable", "optimizer")
THREAD = "checkpoint"


class Checkpoints:
    """The folder `checkpoints/` of a run; one save at a time goes on in a thread.

    Old ones are removed after a save: the newest `keep` stay, the best by score, and with
    `keep_every` those whose step is a multiple of it. Of several processes, which all see the
    folder, the first one writes.
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
        self._snapshot: dict[str, np.ndarray] = {}

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        if self._store:
            numbers = [name for name in remote.names(self._store) if is_step(name)]
            found = [name for name in numbers if remote.holds(self.place(int(name)), META)]
        elif self.folder.is_dir():
            names = [path.name for path in self.folder.iterdir() if (path / META).is_file()]
            found = [name for name in names if is_step(name)]
        else:
            found = []
        return sorted(map(int, found))

    def newest(self) -> int:
        """The newest step, as process 0 sees it (a shared folder may show up late); 0: none."""
        steps = self.steps() if jax.process_index() == 0 else []
        return int(multihost_utils.broadcast_one_to_all(np.int64(steps[-1] if steps else 0)))

    def path(self, step: int) -> Path:
        """The folder of that step on the disk."""
        return self.folder / str(step)

    def place(self, step: int) -> str:
        """Where that step is kept, on the disk or elsewhere."""
        return f"{self._store or self.folder}/{step}"

    def meta(self, step: int) -> Meta:
        """What `meta.json` of that step says."""
        if not self._store:
            raw = (self.path(step) / META).read_bytes()
        else:
            raw = remote.read(self.place(step), META) or b""
        try:
            return parse_meta(raw, self.place(step))
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
        writes = jax.process_index() == 0
        trainable = _on_host(checkpoint.flatten(state.params), self._snapshot, writes)
        rest = _on_host(dict(_optimizer_leaves(state, rng)), self._snapshot, writes)
        meta = {"format": FORMAT, "step": step, "score": None} | meta
        if writes:

            def work() -> None:
                self._write(step, trainable, rest, meta)
                then()

            self._saving = self._writer.submit(work)

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

    def restore(
        self, step: int, like: TrainState, rng: Array, meta: Meta
    ) -> tuple[TrainState, Array, Meta]:
        """State, random key and meta of that step, placed as the leaves of `like` are.

        `meta` is what the present run would save: its variant, trainable parts and base are
        compared first, then keys, shapes and dtypes, then the hash of every leaf.
        """
        found = self.meta(step)
        compare_meta(self.place(step), found, meta)
        if self._store:
            remote.get(self.place(step), self.path(step))
        rest_like = checkpoint.unflatten(dict(_optimizer_leaves(like, rng)))
        try:
            for part in PARTS:
                check_manifest(found, self.path(step), part)
            trainable = self._read(step, "trainable", like.params)
            rest = checkpoint.flatten(self._read(step, "optimizer", rest_like))
        except checkpoint.CheckpointError as error:
            message = f"{error}\n  {self._way_past(step)}"
            raise checkpoint.CheckpointError(message) from error
        finally:
            if self._store:
                shutil.rmtree(self.path(step), ignore_errors=True)
        place = lambda leaf, old: jax.make_array_from_callback(
            old.shape, old.sharding, lambda part: np.asarray(leaf)[part]
        )
        params = jax.tree.map(place, trainable, like.params)
        flat, treedef = jax.tree_util.tree_flatten_with_path(like.optimizer)
        moments = [place(rest[_leaf_path(path)], old) for path, old in flat]
        state = TrainState(
            place(rest["step"], like.step),
            params,
            jax.tree_util.tree_unflatten(treedef, moments),
        )
        key = jax.random.wrap_key_data(jnp.asarray(rest["rng"]), impl=jax.random.key_impl(rng))
        return state, key, found

    def _read(self, step: int, part: str, like: Any) -> checkpoint.Tree:
        return checkpoint.read_tree(self.path(step) / part, expected=like, strict_dtype=True)

    def _write(
        self, step: int, trainable: Mapping[str, Any], rest: Mapping[str, Any], meta: Meta
    ) -> None:
        try:
            alone = jax.process_count() == 1
            write_tree = checkpoint.write_tree if alone else checkpoint.write_tree_apart
            with checkpoint.atomic_folder(self.path(step)) as partial:
                write_tree(partial / "trainable", trainable.items())
                write_tree(partial / "optimizer", rest.items())
                (partial / META).write_text(seal(bind(meta, partial, PARTS)))
            if self._store:
                self._upload(step)
        except OSError as error:
            cure = "When the store answers" if self._store else "With room made there"
            raise OSError(
                error.errno or errno.EIO,
                f"the checkpoint of step {step} was not saved ({error.strerror or error}); intact "
                f"in {self._store or self.folder}: {self._there()}. {cure}, start the run again",
            ) from error
        self._remove_old()

    def _write_score(self, step: int, score: float) -> None:
        text = seal(self.meta(step) | {"score": score})
        path = self.path(step) / META
        if self._store:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
        if self._store:
            try:
                remote.put_file(path, self.place(step))
            finally:
                shutil.rmtree(path.parent, ignore_errors=True)
        self._remove_old()

    def _remove_old(self) -> None:
        keep = {*self.steps()[-self._keep :], self.best()}
        for old in self.steps():
            if old not in keep and not (self._keep_every and old % self._keep_every == 0):
                self._remove(old)

    def _way_past(self, step: int) -> str:
        """What helps where that checkpoint is damaged."""
        before = [each for each in self.steps() if each < step]
        way = f"go on from step {before[-1]}" if before else "start over"
        return f"remove {self.place(step)} to {way}"

    def _upload(self, step: int) -> None:
        """Moves the checkpoint from the disk to the store."""
        try:
            remote.remove(self.place(step))  # what a killed process has left
            remote.put(self.path(step), self.place(step), last=META)
        finally:
            shutil.rmtree(self.path(step), ignore_errors=True)

    def _remove(self, step: int) -> None:
        if self._store:
            remote.remove(self.place(step), first=META)
            return
        # Renamed first: a removal cut short must not leave half a numbered folder.
        doomed = self.folder / f".{step}.removed"
        shutil.rmtree(doomed, ignore_errors=True)
        self.path(step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _there(self) -> str:
        """Which steps are complete, for a message; a store that fails may not even tell."""
        try:
            return ", ".join(map(str, self.steps())) or "none"
        except Exception:
            return "all that were there before"


def is_writing() -> bool:
    """Whether a thread of this process is writing a checkpoint."""
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())


def is_step(name: str) -> bool:
    """Tells that a folder of this name is one of a checkpoint."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def _on_host(
    leaves: Mapping[str, Array], kept: dict[str, np.ndarray], wanted: bool
) -> dict[str, np.ndarray]:
    """The host's copies of the leaves, whichever devices of all processes hold their parts.

    Every process must ask; none are there where they are not `wanted`. Copies of a CPU's arrays are
    `kept` until those of the next save take their place: the pages of fresh memory would have to be
    fetched, which takes longer than the copying.
    """
    on_cpu = jax.default_backend() == "cpu"
    here = {
        path
        for path, leaf in leaves.items()
        if leaf.is_fully_addressable or leaf.is_fully_replicated
    }
    if wanted and not on_cpu:
        for path in here:  # all under way, before the first is waited for
            leaves[path].copy_to_host_async()
    copies: dict[str, np.ndarray] = {}
    for path, leaf in leaves.items():
        if path not in here:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        if not wanted:
            continue
        copies[path] = np.asarray(leaf)
        if on_cpu and path in here:  # a view of the buffer, which the next step takes over
            kept.setdefault(path, np.empty_like(copies[path]))
            np.copyto(kept[path], copies[path])
            copies[path] = kept[path]
    return copies


def _optimizer_leaves(state: TrainState, rng: Array) -> Iterator[tuple[str, Array]]:
    yield "step", state.step
    yield "rng", jax.random.key_data(rng)
    flat, _ = jax.tree_util.tree_flatten_with_path(state.optimizer)
    yield from ((_leaf_path(path), leaf) for path, leaf in flat)


def _leaf_path(path: tuple[Any, ...]) -> str:
    """`optimizer/0/mu/qformer/queries`: names and positions of the optimizer's tuples and dicts."""
    words = [
        getattr(key, name) for key in path for name in ("key", "name", "idx") if hasattr(key, name)
    ]
    return "/".join(map(str, ("optimizer", *words)))
