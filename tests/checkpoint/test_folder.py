import json
import os
import signal
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
from orbax.checkpoint.experimental import v1 as ocp

from jax_instructblip import checkpoint
from jax_instructblip.checkpoint import CheckpointError, orbax_leaves
from jax_instructblip.checkpoint import folder as checkpoint_folder


def bits(array):
    return np.asarray(array).reshape(-1).view(np.uint8)


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "llm": {
            "embed": {"embedding": rng.normal(size=(40, 8)).astype(ml_dtypes.bfloat16)},
            "layers": {"kernel": rng.normal(size=(3, 8, 2, 4)).astype(np.float16)},
        },
        "qformer": {"queries": rng.normal(size=(1, 4, 6)).astype(np.float32)},
        "step": np.asarray(7, np.int32),
        "seen": rng.integers(0, 2**32, 5, dtype=np.uint32),
    }


@pytest.fixture
def folder(tmp_path):
    checkpoint.write_tree(tmp_path / "ck", checkpoint.flatten(tree()).items())
    return tmp_path / "ck"


def assert_equal(found, wanted):
    found, wanted = checkpoint.flatten(found), checkpoint.flatten(wanted)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert (found[path].dtype, found[path].shape) == (array.dtype, array.shape), path
        np.testing.assert_array_equal(bits(found[path]), bits(array), err_msg=path)


def files_of(folder, leaf):
    """The files of one leaf: its metadata and its bytes."""
    place = folder / "params" / "state" / leaf.replace("/", ".")
    return place / ".zarray", next(path for path in place.iterdir() if path.name != ".zarray")


def flip(path, position, bit=3):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_round_trip_keeps_every_bit_and_dtype(folder):
    assert_equal(checkpoint.read_tree(folder), tree())


def test_odd_bits_survive(tmp_path):
    every = np.arange(2**16, dtype=np.uint16)  # each bfloat16 and float16 there is, NaNs included
    leaves = {"a": every.view(ml_dtypes.bfloat16), "b": every.view(np.float16)}
    leaves["c"] = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    checkpoint.write_tree(tmp_path / "ck", leaves.items())
    assert_equal(checkpoint.read_tree(tmp_path / "ck"), leaves)


def test_jax_arrays_can_be_written(tmp_path):
    checkpoint.write_tree(tmp_path / "ck", [("a/x", jnp.arange(6, dtype=jnp.bfloat16))])
    found = checkpoint.read_tree(tmp_path / "ck")
    assert_equal(found, {"a": {"x": np.arange(6).astype(ml_dtypes.bfloat16)}})


def test_orbax_alone_reads_it(folder):
    assert_equal(ocp.load(str(folder / "params")), tree())
    found = orbax.checkpoint.StandardCheckpointer().restore(folder / "params" / "state")
    assert_equal(found, tree())


def test_flatten_and_unflatten_undo_each_other():
    assert_equal(checkpoint.unflatten(checkpoint.flatten(tree())), tree())
    with pytest.raises(ValueError, match="without '/'"):
        checkpoint.flatten({"a/b": 1})
    with pytest.raises(ValueError, match="below another leaf"):
        checkpoint.unflatten({"a": 1, "a/b": 2})
    with pytest.raises(ValueError, match="above another leaf"):
        checkpoint.unflatten({"a/b": 1, "a": 2})


def test_one_leaf_is_held_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "GROUP_BYTES", 1)
    born = []

    def alive():
        return sum(ref() is not None for ref in born)

    def leaves():
        for i in range(5):
            assert alive() == 0, f"leaf {i} is made while another is held"
            made = np.full((100, 100), i, np.float32)
            born.append(weakref.ref(made))
            yield f"leaf{i}", made
            del made

    checkpoint.write_tree(tmp_path / "ck", leaves())
    born.clear()
    load = orbax_leaves.load

    def watched(*args):
        assert alive() == 0, "a leaf is read while another is held"
        yield from load(*args)

    def place(path, array):
        born.append(weakref.ref(array))
        return float(array[0, 0])

    monkeypatch.setattr(orbax_leaves, "load", watched)
    found = checkpoint.read_tree(tmp_path / "ck", place=place)
    assert found == {f"leaf{i}": float(i) for i in range(5)}
    for path, array in checkpoint.read_leaves(tmp_path / "ck"):
        place(path, array)
        del array


def test_leaves_come_in_the_order_asked_for(folder):
    paths = ["qformer/queries", "llm/embed/embedding", "qformer/queries"]
    found = list(checkpoint.read_leaves(folder, paths[:2]))
    assert [path for path, _ in found] == paths[:2]
    np.testing.assert_array_equal(bits(found[0][1]), bits(tree()["qformer"]["queries"]))
    assert [path for path, _ in checkpoint.read_leaves(folder)] == sorted(
        checkpoint.flatten(tree())
    )
    with pytest.raises(CheckpointError, match="no such leaves.*\n  a/b\n  c"):
        list(checkpoint.read_leaves(folder, ["c", "a/b", "step"]))


def test_expected_tree_is_compared_with_all_mismatches_listed(folder):
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree())
    checkpoint.read_tree(folder, expected=expected, strict_dtype=True)
    expected["qformer"]["queries"] = jax.ShapeDtypeStruct((1, 5, 6), np.float32)
    expected["seen"] = jax.ShapeDtypeStruct((5,), np.int32)
    expected["extra"] = jax.ShapeDtypeStruct((2, 3), np.float32)
    del expected["step"]
    with pytest.raises(CheckpointError) as error:
        checkpoint.read_tree(folder, expected=expected, strict_dtype=True)
    assert str(error.value).splitlines()[1:] == [
        "  extra: missing, expected [2, 3] float32",
        "  qformer/queries: found [1, 4, 6] float32, expected [1, 5, 6] float32",
        "  seen: found [5] uint32, expected [5] int32",
        "  step: unexpected, found [] int32",
    ]
    with pytest.raises(CheckpointError) as error:
        checkpoint.read_tree(folder, expected=expected)
    assert "seen" not in str(error.value)


def test_flipped_bits_are_refused_by_name(folder):
    for leaf in ("llm/embed/embedding", "step"):
        flip(files_of(folder, leaf)[1], 0)
    with pytest.raises(CheckpointError) as error:
        checkpoint.read_tree(folder)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["llm/embed/embedding", "step"]
    with pytest.raises(CheckpointError, match="llm/embed/embedding"):
        list(checkpoint.read_leaves(folder, ["llm/embed/embedding"]))
    list(checkpoint.read_leaves(folder, ["seen"]))  # another leaf is not concerned
    found = checkpoint.read_tree(folder, verify=False)  # Orbax itself does not notice
    assert int(found["step"]) != 7


@pytest.mark.parametrize(
    "damage",
    [
        lambda meta, data: flip(meta, 2, 6),
        lambda meta, data: data.write_bytes(data.read_bytes()[:-1]),
        lambda meta, data: data.unlink(),
    ],
    ids=["metadata", "truncated", "removed"],
)
def test_damaged_file_is_refused_by_name(folder, damage):
    damage(*files_of(folder, "llm/layers/kernel"))
    with pytest.raises(
        CheckpointError, match=r"damaged.*\(1\):\n  llm/layers/kernel: cannot be read"
    ):
        checkpoint.read_tree(folder)


def test_silent_cast_is_refused(folder):
    meta, _ = files_of(folder, "qformer/queries")
    meta.write_text(meta.read_text().replace('"<f4"', '"<i4"'))
    with pytest.raises(
        CheckpointError, match=r"queries: found \[1, 4, 6\] int32, expected .*float32"
    ):
        checkpoint.read_tree(folder, verify=False)


def test_leaf_that_orbax_lost_is_reported(folder):
    manifest = checkpoint.read_manifest(folder)
    manifest["ghost"] = manifest["step"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"ghost: missing, expected \[\] int32"):
        checkpoint.read_tree(folder)


def test_no_checkpoint_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder: it has no manifest.json"):
        checkpoint.read_tree(tmp_path)
    (tmp_path / "manifest.json").write_text('{"a": {"shape"')
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        checkpoint.read_tree(tmp_path)


def test_manifest_and_digest(folder, tmp_path):
    manifest = checkpoint.read_manifest(folder)
    assert manifest["llm/layers/kernel"]["shape"] == [3, 8, 2, 4]
    assert manifest["llm/embed/embedding"]["dtype"] == "bfloat16"
    assert checkpoint.manifest_bytes(manifest) == sum(x.nbytes for x in jax.tree.leaves(tree()))
    digest = checkpoint.manifest_digest(folder)
    same = tmp_path / "same"
    checkpoint.write_tree(same, reversed(checkpoint.flatten(tree()).items()))
    assert checkpoint.manifest_digest(same) == digest  # of the content, not of the order
    other = tree()
    other["step"] = np.asarray(8, np.int32)
    checkpoint.write_tree(tmp_path / "other", checkpoint.flatten(other).items())
    assert checkpoint.manifest_digest(tmp_path / "other") != digest


def test_config_of_another_format_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json"):
        checkpoint.read_config(tmp_path)
    checkpoint.write_config(tmp_path, {"variant": {"a": 1}})
    assert checkpoint.read_config(tmp_path) == {"format": 1, "variant": {"a": 1}}
    (tmp_path / "config.json").write_text('{"format": 2}')
    with pytest.raises(CheckpointError, match="format 2, this version reads 1: update the package"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(CheckpointError, match="another program's folder"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize("group", [1, checkpoint_folder.GROUP_BYTES])
@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ([("a", np.ones(2)), ("a", np.ones(2))], "'a' is given twice"),
        ([("a", np.ones(2)), ("a/b", np.ones(2))], "above another leaf|below another leaf"),
        ([("a", np.array(["x"]))], "only numbers"),
        ([], "no leaves"),
    ],
)
def test_unwritable_leaves_are_refused_and_leave_nothing(
    tmp_path, monkeypatch, leaves, message, group
):
    monkeypatch.setattr(checkpoint_folder, "GROUP_BYTES", group)
    with pytest.raises(ValueError, match=message):
        checkpoint.write_tree(tmp_path / "ck", leaves)
    assert list(tmp_path.iterdir()) == []


def test_failing_generator_leaves_nothing_and_the_old_checkpoint_loads(folder, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "GROUP_BYTES", 1)

    def leaves():
        yield "a", np.ones(3)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        checkpoint.write_tree(folder.parent / "new", leaves())
    with pytest.raises(FileExistsError, match="not overwritten"):
        checkpoint.write_tree(folder, leaves())
    assert [path.name for path in folder.parent.iterdir()] == ["ck"]
    assert_equal(checkpoint.read_tree(folder), tree())


WRITER = """
import sys, time
import numpy as np
from jax_instructblip import checkpoint
from jax_instructblip.checkpoint import folder as checkpoint_folder

checkpoint_folder.GROUP_BYTES = 1

def leaves():
    for i in range(1000):
        yield f"leaf{i}", np.full((64, 64), i, np.float32)
        print("written", i, flush=True)

SETUP
checkpoint.write_tree(sys.argv[1], leaves())
"""


def start_writer(target, setup=""):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER.replace("SETUP", setup), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_kill_9_in_the_middle_loses_nothing(folder):
    target = folder.parent / "new"
    process = start_writer(target)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "written 3":
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    assert_equal(checkpoint.read_tree(folder), tree())
    assert len(list(folder.parent.iterdir())) == 2  # the old one and the hidden remains
    checkpoint.write_tree(target, [("a", np.ones(3))])
    assert sorted(path.name for path in folder.parent.iterdir()) == ["ck", "new"]
    assert_equal(checkpoint.read_tree(target), {"a": np.ones(3)})


def test_full_disk_is_one_clear_error_and_leaves_nothing(folder):
    """The system refuses to write past a limit, as it does where no room is left."""
    target = folder.parent / "new"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    process = start_writer(target, limit)
    _, errors = process.communicate()
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("OSError"), errors
    assert "new: writing leaf0 failed, nothing was left there" in last
    assert "GB were free" in last and "File too large" in last
    assert "ERROR:absl" not in errors and "Event loop" not in errors
    assert [path.name for path in folder.parent.iterdir()] == ["ck"]
    assert_equal(checkpoint.read_tree(folder), tree())
