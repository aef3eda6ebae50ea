"""Checkpoints in an object store."""

import errno
import os

import jax
import pytest

from jax_instructblip import checkpoint, remote
from jax_instructblip.training.checkpoints import Checkpoints
from jax_instructblip.training.earlier_run import set_incomplete_aside
from tests.helpers.bucket import bucket
from tests.training.test_checkpoints import RNG, make_meta, make_state, save


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)
    with bucket() as made:
        yield made


def in_store(tmp_path, **fields):
    return Checkpoints(tmp_path / "local", store="gs://bucket/run/checkpoints", **fields)


def test_in_an_object_store_as_on_the_disk(store, tmp_path):
    manager = in_store(tmp_path, keep=2)
    for step, score in [(1, 0.9), (2, 0.1), (3, None), (4, 0.2)]:
        save(manager, step, score)
    assert manager.steps() == [1, 3, 4] and manager.best() == 1
    assert not os.listdir(tmp_path / "local")  # nothing stays on the disk
    state, _, meta = in_store(tmp_path / "other").restore(4, make_state(), RNG, make_meta())
    saved = make_state(4, seed=4)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, saved))
    assert meta["step"] == 4
    with pytest.raises(FileExistsError, match=r"gs://bucket/run/checkpoints holds .* \[3, 4\]"):
        manager.save(make_state(3), RNG, make_meta())


def test_a_score_may_come_after_the_save_in_an_object_store(store, tmp_path):
    manager = in_store(tmp_path, keep=1)
    for step, score in [(1, 0.9), (2, 0.1)]:
        save(manager, step)
        manager.record_score(step, score)
        manager.wait()
    assert manager.steps() == [1, 2] and manager.best() == 1
    assert not os.listdir(tmp_path / "local")
    assert set_incomplete_aside(manager, fresh=False) == []
    in_store(tmp_path / "other").restore(2, make_state(), RNG, make_meta())


def test_a_flipped_bit_in_an_object_store_is_found(store, tmp_path):
    manager = in_store(tmp_path)
    save(manager, 1)
    name = "/bucket/run/checkpoints/1/trainable/params/state/qformer.queries/0.0.0"
    data = bytearray(store.store[name].getvalue())
    data[5] ^= 1
    store.store[name].seek(0)
    store.store[name].write(bytes(data))
    with pytest.raises(checkpoint.CheckpointError, match="qformer/queries: its bytes .*") as error:
        manager.restore(1, make_state(), RNG, make_meta())
    assert "remove gs://bucket/run/checkpoints/1 to start over" in str(error.value)


@pytest.mark.parametrize("file", ["queries/0.0.0", "meta.json"])
def test_an_object_store_that_fails_within_a_save_has_no_half_checkpoint(store, tmp_path, file):
    manager = in_store(tmp_path)
    save(manager, 1)

    def fail(path):
        if "checkpoints/2/" in path and path.endswith(file):
            raise ConnectionError("503 the store is busy")

    store.before = fail
    manager.save(make_state(2), RNG, make_meta())
    message = r"step 2 was not saved \(.*503 the store is busy \(3 tries\)\); intact in gs:.*: 1\."
    with pytest.raises(OSError, match=rf"{message} When the store") as raised:
        manager.wait()
    assert raised.value.errno == errno.EIO
    assert manager.steps() == [1] and manager.newest() == 1
    assert any("checkpoints/2/" in path for path in store.store)  # half of it lies there
    store.before = None
    save(manager, 2)  # over what was left
    assert manager.steps() == [1, 2]
    manager.restore(2, make_state(), RNG, make_meta())
