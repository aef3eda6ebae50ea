"""Saves of several processes, which are threads here; real ones are in tests/parallel."""

import os
import threading
import time
import types

import numpy as np
import pytest

from jax_instructblip import checkpoint, remote
from jax_instructblip.checkpoint.leaf_parts import OwnPart
from jax_instructblip.checkpoint.step_meta import check_manifest, read_meta
from jax_instructblip.training import shared_save
from jax_instructblip.training.shared_save import SharedSave, remove_parts
from tests.helpers.bucket import bucket

COUNT = 3
KERNEL = np.arange(24, dtype=np.float32).reshape(6, 4)
META = {"format": 1, "step": 7, "variant": {}, "trainable": []}
META["base"] = {"path": "base", "sha256": "0"}
SHAPES = {"trainable": {"a/kernel": (6, 4)}, "optimizer": {"step": ()}}


@pytest.fixture
def processes(monkeypatch):
    """`processes(work)` calls `work(index)` as each of the processes; the errors they raise."""
    here = threading.local()
    fake = types.SimpleNamespace(process_index=lambda: here.index, process_count=lambda: COUNT)
    monkeypatch.setattr(shared_save, "jax", fake)
    monkeypatch.setattr(shared_save, "POLL_STORE_SECONDS", 0.01)

    def run(work, absent=()):
        errors = []

        def one(index):
            here.index = index
            try:
                work(index)
            except OSError as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=[i]) for i in range(COUNT) if i not in absent]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors

    return run


def saver(folder, store="", token="ab", ending=None):
    def work(index):
        place = folder / str(index) if store else folder
        save = SharedSave(place, store, 7, token, ending or threading.Event())
        rows = OwnPart("a/kernel", (2 * index, 0), KERNEL[2 * index : 2 * index + 2])
        number = [OwnPart("step", (), np.int32(7))] if index == 0 else []
        save.write({"trainable": [rows], "optimizer": number})
        if index == 0:
            save.commit(SHAPES, META)

    return work


def check_saved(folder):
    meta = read_meta(folder)
    assert meta["step"] == 7
    for part in SHAPES:
        check_manifest(meta, folder, part)
    found = checkpoint.read_tree(folder / "trainable")
    np.testing.assert_array_equal(found["a"]["kernel"], KERNEL)
    assert checkpoint.read_tree(folder / "optimizer")["step"] == 7
    assert sorted(os.listdir(folder / "trainable/params/state/a.kernel")) == ["0.0", "2.0", "4.0"]


def test_the_parts_of_all_become_one_checkpoint(tmp_path, processes):
    assert processes(saver(tmp_path)) == []
    assert os.listdir(tmp_path) == ["7"]
    assert sorted(os.listdir(tmp_path / "7")) == ["meta.json", "optimizer", "trainable"]
    check_saved(tmp_path / "7")


def test_in_a_store_as_on_a_disk(tmp_path, processes):
    with bucket() as store:
        assert processes(saver(tmp_path, "gs://bucket/run")) == []
        names = [name.removeprefix("/bucket/run/7/") for name in store.store]
        assert names[-1] == "meta.json" and not any("done" in name for name in names)
        assert all(not os.listdir(tmp_path / str(index)) for index in range(COUNT))
        remote.get("gs://bucket/run/7", tmp_path / "7")
    check_saved(tmp_path / "7")


def test_nothing_appears_without_the_parts_of_all(tmp_path, processes, monkeypatch):
    monkeypatch.setattr(shared_save, "GRACE_SECONDS", 0.2)
    ending = threading.Event()
    timer = threading.Timer(0.3, ending.set)
    timer.start()
    (error,) = processes(saver(tmp_path, ending=ending), absent=[1])
    assert "the parts of process 1 did not come: a process was lost, and for 0.2 s" in str(error)
    assert not (tmp_path / "7").exists()
    left = sorted(os.listdir(tmp_path))
    assert left == [".7.part-ab-0", ".7.part-ab-2"]
    assert processes(saver(tmp_path, token="cd")) == []  # started again, over what was left
    check_saved(tmp_path / "7")
    remove_parts(tmp_path)
    assert os.listdir(tmp_path) == ["7"]


def test_while_the_parts_of_the_others_grow_they_are_waited_for(tmp_path, processes, monkeypatch):
    """A process has gone, but its parts were complete; another one still writes."""
    monkeypatch.setattr(shared_save, "GRACE_SECONDS", 0.5)
    ending, write = threading.Event(), shared_save.write_file
    ending.set()

    def slow(path, text):
        if path.name == "done-ab-2.json":
            for size in range(12):
                time.sleep(0.1)
                (path.parent / "growing").write_bytes(b"x" * size)
        write(path, text)

    monkeypatch.setattr(shared_save, "write_file", slow)
    assert processes(saver(tmp_path, ending=ending)) == []
    check_saved(tmp_path / "7")


def test_a_disk_that_is_full_leaves_nothing_of_this_process(tmp_path, processes, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_save.leaf_parts, "write_parts", full)
    errors = processes(saver(tmp_path))
    assert len(errors) == COUNT and not os.listdir(tmp_path)


def test_a_missing_part_is_found_before_the_commit(tmp_path, processes):
    shapes = {**SHAPES, "trainable": {"a/kernel": (8, 4)}}
    damaged = []

    def work(index):
        save = SharedSave(tmp_path, "", 7, "ab", threading.Event())
        part = OwnPart("a/kernel", (2 * index, 0), KERNEL[:2])
        save.write({"trainable": [part], "optimizer": []})
        if index == 0:
            try:
                save.commit(shapes, META)
            except checkpoint.CheckpointError as error:
                damaged.append(str(error))

    assert processes(work) == []
    assert "they have 24 numbers, the leaf 32" in damaged[0]
    assert not (tmp_path / "7").exists()
