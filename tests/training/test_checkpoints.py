import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.checkpoint.step_meta import read_meta, seal
from jax_instructblip.training import checkpoints
from jax_instructblip.training.checkpoints import Checkpoints
from jax_instructblip.training.optimizer import adamw
from jax_instructblip.training.state import create_state

RNG = jax.random.key(3)


def make_state(step=0, seed=0):
    draw = np.random.default_rng(seed)
    params = {
        "qformer": {
            "queries": draw.normal(size=(1, 3, 4)).astype(np.float32),
            "layers": {"mlp": {"in": {"kernel": draw.normal(size=(2, 4, 5)).astype(np.float32)}}},
        }
    }
    state = create_state(params, adamw(lambda _: 0.1))
    return state._replace(step=jnp.int32(step))


def make_meta(**changes):
    return {
        "variant": {"llm": {"layers": 2, "kind": "t5"}, "qformer": {"queries": 3}},
        "trainable": ["qformer"],
        "base": {"name": "tiny", "path": "/checkpoints/tiny", "sha256": "ab" * 32},
        "data": {"step": 0, "seed": 0, "fingerprint": "f"},
    } | changes


def save_one(manager, state, **changes):
    manager.save(state, RNG, make_meta(**changes))
    manager.wait()


def save(manager, step, score=None):
    save_one(manager, make_state(step, seed=step), score=score)


def test_restores_what_was_saved_to_the_bit(tmp_path):
    manager = Checkpoints(tmp_path / "checkpoints")
    assert manager.steps() == [] and manager.best() is None
    saved = make_state(7, seed=1)
    saved = saved._replace(optimizer=jax.tree.map(lambda leaf: leaf + 1, saved.optimizer))
    data = {"step": 7, "seed": 5, "fingerprint": "f"}
    manager.save(saved, RNG, make_meta(data=data))
    manager.wait()
    state, rng, meta = Checkpoints(tmp_path / "checkpoints").restore(
        7, make_state(), jax.random.key(99), make_meta()
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, saved))
    assert jax.tree.structure(state) == jax.tree.structure(saved)
    assert jax.random.key_data(rng).tolist() == jax.random.key_data(RNG).tolist()
    assert (meta["data"], meta["step"], meta["score"]) == (data, 7, None)


def test_what_is_saved_is_a_copy(tmp_path, monkeypatch):
    """The next step takes over the buffers while the thread still writes."""
    write, written = checkpoint.write_tree, {}

    def record(folder, leaves):
        written[folder.name] = dict(leaves)
        return write(folder, written[folder.name].items())

    monkeypatch.setattr(checkpoint, "write_tree", record)
    manager, places = Checkpoints(tmp_path), []
    for step in (1, 2):
        state = make_state(step, seed=step)
        save_one(manager, state)
        trainable, rest = written["trainable"], written["optimizer"]
        taken = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
        kept = {leaf.ctypes.data for leaf in [*trainable.values(), *rest.values()]}
        assert len(kept) == len(taken) + 1  # and the random key
        assert not taken & kept
        places.append(kept)
        queries = state.params["qformer"]["queries"]
        np.testing.assert_array_equal(trainable["qformer/queries"], queries)
        assert rest["step"] == step
    assert places[0] == places[1]  # fresh memory would have to be fetched first


def test_keeps_the_newest_and_the_best(tmp_path):
    manager = Checkpoints(tmp_path, keep=2)
    for step, score in [(1, 0.2), (2, 0.9), (3, 0.5), (4, None), (5, 0.6)]:
        save(manager, step, score)
    assert manager.steps() == [2, 4, 5]
    assert manager.best() == 2
    assert sorted(os.listdir(tmp_path)) == ["2", "4", "5"]


def test_keeps_every_so_many_steps(tmp_path):
    manager = Checkpoints(tmp_path, keep=1, keep_every=4)
    for step in range(2, 15, 2):
        save(manager, step)
    assert manager.steps() == [4, 8, 12, 14]


def test_a_folder_that_holds_a_later_run_is_refused(tmp_path):
    save(Checkpoints(tmp_path), 7)
    for step in (3, 7):
        with pytest.raises(FileExistsError, match=rf"holds the checkpoints \[7\].* step {step}"):
            save(Checkpoints(tmp_path), step)
    assert Checkpoints(tmp_path).newest() == 7


def test_of_equal_scores_the_later_is_best(tmp_path):
    manager = Checkpoints(tmp_path)
    save(manager, 1, 0.5)
    save(manager, 2, 0.5)
    assert manager.best() == 2


def test_the_trained_weights_are_a_checkpoint_folder_of_their_own(tmp_path):
    save(Checkpoints(tmp_path), 3)
    tree = checkpoint.read_tree(tmp_path / "3" / "trainable")
    assert sorted(checkpoint.flatten(tree)) == [
        "qformer/layers/mlp/in/kernel",
        "qformer/queries",
    ]
    rest = checkpoint.read_manifest(tmp_path / "3" / "optimizer")
    assert {"step", "rng", "optimizer/0/mu/qformer/queries"} <= set(rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"variant": {"llm": {"layers": 3, "kind": "t5"}, "qformer": {"queries": 3}}},
            "variant: llm.layers is 2, the run has 3",
        ),
        (
            {"base": {"name": "other", "path": "/other", "sha256": "cd" * 32}},
            r"base /checkpoints/tiny \(sha256 abababababab...\), the run has /other \(cdcdcd",
        ),
        ({"trainable": ["qformer", "vision"]}, "it trains .*, the run trains"),
    ],
)
def test_refuses_another_run(tmp_path, changes, message):
    manager = Checkpoints(tmp_path)
    save(manager, 1)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        manager.restore(1, make_state(), RNG, make_meta(**changes))


def test_a_moved_base_is_the_same_base(tmp_path):
    manager = Checkpoints(tmp_path)
    save(manager, 1)
    moved = {"name": "tiny", "path": "/elsewhere", "sha256": "ab" * 32}
    manager.restore(1, make_state(), RNG, make_meta(base=moved))


def test_refuses_other_shapes(tmp_path):
    manager = Checkpoints(tmp_path)
    save(manager, 1)
    like = make_state()
    like.params["qformer"]["queries"] = jnp.zeros((1, 4, 4))
    with pytest.raises(checkpoint.CheckpointError, match="qformer/queries"):
        manager.restore(1, like, RNG, make_meta())


@pytest.mark.parametrize("part", ["trainable", "optimizer"])
def test_a_flipped_bit_is_found(tmp_path, part):
    manager = Checkpoints(tmp_path)
    save(manager, 1)
    files = [path for path in (tmp_path / "1" / part / "params").rglob("*") if path.is_file()]
    largest = max((path for path in files if "kernel" in str(path)), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match="mlp/in/kernel") as error:
        manager.restore(1, make_state(), RNG, make_meta())
    assert str(error.value).endswith(f"remove {tmp_path / '1'} to start over")
    (tmp_path / "1").rename(tmp_path / "2")
    save(Checkpoints(tmp_path / "other"), 1)
    (tmp_path / "other" / "1").rename(tmp_path / "1")
    with pytest.raises(checkpoint.CheckpointError, match=r"remove .*/2 to go on from step 1$"):
        manager.restore(2, make_state(), RNG, make_meta())


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    manager = Checkpoints(tmp_path)
    save(manager, 1)
    write = checkpoint.write_tree

    def full(folder, leaves):
        if folder.name == "optimizer":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, leaves)

    monkeypatch.setattr(checkpoint, "write_tree", full)
    manager.save(make_state(2), RNG, make_meta())
    message = (
        rf"checkpoint of step 2 was not saved \(No space left.*\); intact in {tmp_path}: 1\. With r"
    )
    with pytest.raises(OSError, match=message):
        manager.wait()
    assert manager.steps() == [1]
    assert os.listdir(tmp_path) == ["1"]
    manager.restore(1, make_state(), RNG, make_meta())
    monkeypatch.undo()
    save(manager, 2)  # there is room again
    assert manager.steps() == [1, 2]


def test_an_error_of_the_thread_is_raised_by_the_next_check(tmp_path, monkeypatch):
    manager = Checkpoints(tmp_path)

    def fail(*_):
        raise OSError("broken")

    monkeypatch.setattr(checkpoint, "write_tree", fail)
    manager.check()  # nothing is going on
    manager.save(make_state(1), RNG, make_meta())
    with pytest.raises(OSError, match="broken"):
        for _ in range(500):
            manager.check()
            time.sleep(0.01)


KILLED = """
import sys, time
from pathlib import Path
from jax_instructblip import checkpoint, remote
from tests.training.test_checkpoints import Checkpoints, RNG, make_meta, make_state, save

folder = Path(sys.argv[1])
manager = Checkpoints(folder)
save(manager, 1)
write = checkpoint.write_tree

def slow(place, leaves):
    if place.name == sys.argv[2]:
        print("saving", flush=True)
        time.sleep(600)
    return write(place, leaves)

checkpoint.write_tree = slow
manager.save(make_state(2, seed=2), RNG, make_meta())
manager.wait()
"""


@pytest.mark.parametrize("part", ["optimizer"])
def test_kill_during_a_save_leaves_the_checkpoint_before_it(tmp_path, part):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), part],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n"  # half of it is on the disk now
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(os.listdir(tmp_path)) == 2  # 1, and a hidden one
    manager = Checkpoints(tmp_path)
    assert manager.steps() == [1]
    state, _, _ = manager.restore(1, make_state(), RNG, make_meta())
    assert int(state.step) == 1
    save(manager, 2)  # the same step once more, over what the killed one left
    assert manager.steps() == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_removal_cut_short_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    manager = Checkpoints(tmp_path, keep=1)
    save(manager, 1)

    def cut_short(folder, **_):
        if folder.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "shutil", types.SimpleNamespace(rmtree=cut_short))
    manager.save(make_state(2), RNG, make_meta())
    with pytest.raises(KeyboardInterrupt):
        manager.wait()
    assert manager.steps() == [2]
    for step in manager.steps():
        assert {"meta.json", "trainable", "optimizer"} <= set(os.listdir(manager.path(step)))


def test_damaged_or_foreign_meta_is_named(tmp_path):
    manager = Checkpoints(tmp_path)
    save(manager, 1)
    path = tmp_path / "1" / "meta.json"
    path.write_text(json.dumps({"format": 9}))
    with pytest.raises(checkpoint.CheckpointError, match="has format 9, this version reads 1"):
        manager.meta(1)
    path.write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match="meta.json is damaged"):
        manager.meta(1)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("variant", None, "variant is None, expected an object"),
        ("trainable", 5, "trainable is 5, expected a tuple, each of it text"),
        ("trainable", ["qformer", 5], "trainable[1] is 5, expected text"),
        ("base", "tiny", "base is 'tiny', expected an object"),
        ("base", {"path": "/a", "sha256": 7}, "base.sha256 is 7, expected text"),
        ("base", {"path": "/a", "sha256": "ab", "name": []}, "base.name is [], expected text"),
        ("data", ["f"], "data is ['f'], expected an object"),
        ("score", "0.5", "score is '0.5', expected a number or None"),
        ("step", True, "step is True, expected a whole number"),
        ("manifests", [1], "manifests is [1], expected an object"),
    ],
)
def test_a_field_of_another_kind_in_meta_is_named(tmp_path, field, value, said):
    manager = Checkpoints(tmp_path)
    save(manager, 1)
    meta = manager.meta(1) | {field: value}
    (tmp_path / "1" / "meta.json").write_text(seal(meta))
    for read in (manager.meta, lambda step: read_meta(tmp_path / "1")):
        with pytest.raises(checkpoint.CheckpointError) as error:
            read(1)
        assert f"{tmp_path / '1'}/meta.json is damaged" in str(error.value)
        assert said in str(error.value)
    (tmp_path / "1" / "meta.json").write_text("{}")
    with pytest.raises(checkpoint.CheckpointError, match="base is None, expected an object"):
        manager.restore(1, make_state(), RNG, make_meta())


def test_a_score_may_come_after_the_save(tmp_path):
    manager = Checkpoints(tmp_path, keep=1)
    for step, score in [(1, 0.2), (2, 0.9), (3, 0.5), (4, 0.95)]:
        save(manager, step)
        kept = manager.steps()
        manager.record_score(step, score)
        manager.wait()
        assert manager.meta(step)["score"] == score
    assert kept == [2, 4]  # the best so far stays until the newest has a score
    assert manager.steps() == [4] and manager.best() == 4
    manager.restore(4, make_state(), RNG, make_meta())


def test_keep_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_what_is_saved_is_the_trained_weights_and_their_moments(tmp_path):
    manager = Checkpoints(tmp_path)
    state = make_state(1)
    save_one(manager, state)
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    leaves = [
        path.stat().st_size
        for path in (tmp_path / "1").rglob("*")
        if path.is_file() and path.name.replace(".", "").isdecimal()  # chunks of arrays
    ]
    counters = 4 + 8 + 4 * sum(leaf.ndim == 0 for leaf in jax.tree.leaves(state.optimizer))
    assert sum(leaves) == 3 * trained + counters  # the step, the random key, Adam's counts


def test_a_disk_without_room_for_one_checkpoint_is_told_before_the_first_step(
    tmp_path, monkeypatch
):
    state = make_state()
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    manager = Checkpoints(tmp_path / "checkpoints")
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: needed)
    manager.check_room(state)
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: needed - 1)
    with pytest.raises(OSError, match=r"a checkpoint takes .* MB are free: make room"):
        manager.check_room(state)
