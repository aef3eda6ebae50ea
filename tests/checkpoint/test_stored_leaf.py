"""Parts of leaves, read from the files of a checkpoint folder."""

import ml_dtypes
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.checkpoint.stored_leaf import StoredLeaf, bytes_read

LEAVES = {
    "llm/layers/mlp/in/kernel": np.arange(4 * 6 * 10).reshape(4, 6, 10).astype(ml_dtypes.bfloat16),
    "llm/embed/embedding": np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32),
    "qformer/temp": np.array(2.5, np.float32),
    "qformer/queries": np.arange(6, dtype=np.float32),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "base"
    checkpoint.write_tree(folder, LEAVES.items())
    return folder


def read(folder, process=0, processes=2, place=lambda path, leaf: leaf, **settings):
    tree = checkpoint.read_parts(
        folder, process=process, processes=processes, place=place, **settings
    )
    return checkpoint.flatten(tree)


def test_parts_are_those_of_the_leaf_and_only_they_are_read(written):
    leaves = read(written)
    assert set(leaves) == set(LEAVES)
    for path, leaf in leaves.items():
        assert (leaf.shape, leaf.dtype) == (LEAVES[path].shape, LEAVES[path].dtype)
        np.testing.assert_array_equal(leaf[...], LEAVES[path])
    before = bytes_read()
    kernel = leaves["llm/layers/mlp/in/kernel"]
    part = kernel[:, 2:4, 5:]
    np.testing.assert_array_equal(part, LEAVES["llm/layers/mlp/in/kernel"][:, 2:4, 5:])
    assert bytes_read() - before == part.nbytes == 4 * 2 * 5 * 2
    wide = kernel.astype(np.float32)
    assert wide.dtype == wide[0].dtype == np.float32
    assert part.flags.owndata and part.base is None


@pytest.mark.parametrize("path", LEAVES)
def test_each_leaf_is_verified_by_one_of_the_processes(written, path, tmp_path):
    folder = tmp_path / "copy"
    folder.symlink_to(written)
    (file,) = [
        p for p in (written / "params/state" / path.replace("/", ".")).iterdir() if p.name[0] != "."
    ]
    original = file.read_bytes()
    file.write_bytes(bytes([original[0] ^ 1]) + original[1:])
    try:
        refused = []
        for process in range(3):
            try:
                read(folder, process, 3)
            except checkpoint.CheckpointError as error:
                assert path in str(error) and "another sha256" in str(error)
                refused.append(process)
        assert len(refused) == 1
    finally:
        file.write_bytes(original)


def test_another_checkpoint_than_expected_is_refused(written):
    expected = checkpoint.unflatten(LEAVES | {"qformer/queries": np.zeros(7, np.float32)})
    with pytest.raises(checkpoint.CheckpointError, match=r"qformer/queries: found \[6\]"):
        read(written, expected=expected)


def test_a_file_of_another_length_is_refused(tmp_path):
    (tmp_path / "leaf").write_bytes(b"12345")
    with pytest.raises(ValueError, match="leaf has 5 bytes, expected 8"):
        StoredLeaf(tmp_path / "leaf", (2,), np.float32)
