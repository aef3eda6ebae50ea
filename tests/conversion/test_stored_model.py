import json

import numpy as np
import pytest

from jax_instructblip import atomic, checkpoint
from jax_instructblip.conversion import stored_model
from jax_instructblip.conversion.stored_model import read_stored_model, tuned, write_checkpoint
from tests.helpers.tiny import write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("stored") / "base")


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    """The base under a trained Q-Former that has one leaf less."""
    trainable = tmp_path_factory.mktemp("stored") / "trainable"
    leaves = dict(checkpoint.read_leaves(base))
    qformer = {path: leaf + 1 for path, leaf in leaves.items() if path.startswith("qformer/")}
    del qformer["qformer/text_embed/embedding"]
    checkpoint.write_tree(trainable, qformer.items())
    found = read_stored_model(base)
    limits = {"qformer_limit": 12}
    changes = {"variant": found.variant, "title": "run", "facts": {"a": 1}, "limits": limits}
    return tuned(found, trainable, **changes)


def test_trained_trees_replace_those_of_the_base_whole(base, model, tmp_path):
    before = dict(checkpoint.read_leaves(base))
    sizes = []
    write_checkpoint(model, tmp_path / "out", progress=sizes.append)
    after = dict(checkpoint.read_leaves(tmp_path / "out"))
    assert before.keys() - after.keys() == {"qformer/text_embed/embedding"}
    for path, leaf in after.items():
        added = 1 if path.startswith("qformer/") else 0
        np.testing.assert_array_equal(leaf, before[path] + added, err_msg=path)
    assert sum(sizes) == model.nbytes == sum(leaf.nbytes for leaf in after.values())


def test_a_merged_folder_says_what_it_is_and_has_the_tokenizers(base, model, tmp_path):
    write_checkpoint(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["source"], config["text"]) == ({"a": 1}, {"qformer_limit": 12})
    for name in stored_model.TOKENIZERS:
        files = sorted(path.name for path in (base / name).iterdir())
        assert sorted(path.name for path in (tmp_path / "out" / name).iterdir()) == files
    again = read_stored_model(tmp_path / "out")
    assert (again.variant, again.limits, again.manifest) == (
        model.variant,
        {"qformer_limit": 12},
        model.manifest,
    )


def test_leaves_come_in_the_order_asked_for(model):
    paths = ["qformer/queries", "vision/cls", "llm/norm/scale", "qformer/layers/cross/mlp"]
    assert [path for path, _ in model.read(paths[:3])] == paths[:3]
    with pytest.raises(checkpoint.CheckpointError, match="no such leaves"):
        list(model.read(paths))


def test_nothing_is_written_where_it_cannot_be(model, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("kept")
    with pytest.raises(FileExistsError, match="not overwritten"):
        write_checkpoint(model, tmp_path / "taken")
    monkeypatch.setattr(atomic, "free_bytes", lambda folder: 10)
    with pytest.raises(OSError, match=r"needs 0\.00 GB, 0\.00 GB are free there"):
        write_checkpoint(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_damaged_leaf_leaves_no_folder(base, tmp_path):
    write_checkpoint(read_stored_model(base), tmp_path / "copy")
    (victim,) = (tmp_path / "copy" / "params" / "state" / "qformer.queries").glob("[0-9]*")
    raw = bytearray(victim.read_bytes())
    raw[3] ^= 4
    victim.write_bytes(raw)
    with pytest.raises(checkpoint.CheckpointError, match="qformer/queries"):
        write_checkpoint(read_stored_model(tmp_path / "copy"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
