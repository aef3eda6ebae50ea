import json

import ml_dtypes
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.checkpoint import leaf_parts
from jax_instructblip.checkpoint.file_hashes import write_hashes
from jax_instructblip.checkpoint.leaf_parts import OwnPart
from jax_instructblip.checkpoint.manifest import CheckpointError

LEAVES = {
    "llm/layers/mlp/in/kernel": np.arange(4 * 6 * 10).reshape(4, 6, 10).astype(ml_dtypes.bfloat16),
    "llm/embed/embedding": np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32),
    "qformer/temp": np.array(2.5, np.float32),
    "qformer/queries": np.arange(6, dtype=np.float32),
}
# Of each leaf: into how many parts each of its axes is split.
SPLITS = {"llm/layers/mlp/in/kernel": (1, 2, 2), "llm/embed/embedding": (2, 1)}


def parts_of(path):
    """All parts of a leaf in order."""
    leaf = LEAVES[path]
    sizes = [n // k for n, k in zip(leaf.shape, SPLITS.get(path, [1] * leaf.ndim), strict=True)]
    grid = np.ndindex(*[n // size for n, size in zip(leaf.shape, sizes, strict=True)])
    for place in grid:
        start = tuple(int(i) * size for i, size in zip(place, sizes, strict=True))
        index = tuple(slice(a, a + size) for a, size in zip(start, sizes, strict=True))
        yield OwnPart(path, start, leaf[index])


def write(folder, processes=2):
    """Writes the leaves as so many processes would: each every so-many-th part."""
    parts = [part for path in LEAVES for part in parts_of(path)]
    written = [
        leaf_parts.write_parts(folder / "params", parts[process::processes])
        for process in range(processes)
    ]
    manifest = leaf_parts.merge(written, {path: leaf.shape for path, leaf in LEAVES.items()})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_hashes(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("parts"))


def assert_leaves(found):
    assert set(found) == set(LEAVES)
    for path, leaf in LEAVES.items():
        assert found[path].dtype == leaf.dtype
        np.testing.assert_array_equal(found[path], leaf)


def test_parts_are_read_as_whole_leaves(written):
    names = sorted(path.name for path in (written / "params/state/llm.embed.embedding").iterdir())
    assert names == ["0.0", "25.0"]
    assert_leaves(checkpoint.flatten(checkpoint.read_tree(written)))
    assert_leaves(checkpoint.flatten(checkpoint.read_tree(written, verify=False)))
    assert_leaves(dict(checkpoint.read_leaves(written)))
    ((path, leaf),) = checkpoint.read_leaves(written, ["qformer/temp"])
    assert (path, leaf.shape, float(leaf)) == ("qformer/temp", (), 2.5)
    expected = checkpoint.unflatten(LEAVES | {"qformer/queries": np.zeros(7, np.float32)})
    with pytest.raises(CheckpointError, match=r"qformer/queries: found \[6\]"):
        checkpoint.read_tree(written, expected=expected)
    checkpoint.write_tree(written.parent / "whole", checkpoint.read_leaves(written))
    assert_leaves(checkpoint.flatten(checkpoint.read_tree(written.parent / "whole")))


@pytest.mark.parametrize("block", [1, 200, 2**24])
def test_any_place_is_read_from_the_parts_that_have_it(written, monkeypatch, block):
    monkeypatch.setattr("jax_instructblip.checkpoint.stored_leaf._BLOCK", block)
    keep = lambda path, leaf: leaf
    tree = checkpoint.read_parts(written, process=0, processes=2, place=keep)
    kernel = checkpoint.flatten(tree)["llm/layers/mlp/in/kernel"]
    whole = LEAVES["llm/layers/mlp/in/kernel"]
    for index in (
        ...,
        (slice(1, 3), slice(2, 5), slice(3, 8)),
        (slice(None), slice(0, 3), slice(5, 10)),
        (2, slice(None), slice(4, 6)),
        (slice(0, 0), slice(None), slice(None)),
        slice(1, 2),
        3,
    ):
        np.testing.assert_array_equal(kernel[index], whole[index])
    wide = kernel.astype(np.float32)[1:, 2:4]
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, whole[1:, 2:4])


def test_a_flipped_bit_in_any_part_is_found_by_one_of_the_processes(tmp_path):
    write(tmp_path)
    files = [path for path in (tmp_path / "params").rglob("*") if path.is_file()]
    assert len(files) == 4 + 2 + 1 + 1
    for file in files:
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 4]))
        path = file.parent.name.replace(".", "/")
        for read in (checkpoint.read_tree, lambda folder: list(checkpoint.read_leaves(folder))):
            with pytest.raises(CheckpointError, match=f"{path}: its bytes have another sha256"):
                read(tmp_path)
        refused = 0
        for process in range(3):
            try:
                place = lambda path, leaf: leaf[...]
                checkpoint.read_parts(tmp_path, process=process, processes=3, place=place)
            except CheckpointError as error:
                assert path in str(error)
                refused += 1
        assert refused == 1
        file.unlink()
        with pytest.raises(CheckpointError, match=f"{path}: cannot be read"):
            checkpoint.read_tree(tmp_path)
        file.write_bytes(before)
    checkpoint.read_tree(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("25.0"), "they have 200 numbers, the leaf 400"),
        (lambda parts: parts["25.0"].update(shape=[26, 8]), r"ends at \[51, 8\], the leaf at"),
        (lambda parts: parts.update({"0.0": parts["0.0"] | {"shape": [50, 8]}}), "they have 600"),
        (lambda parts: parts.update({"24.0": parts.pop("25.0")}), r"overlap at \[24, 0\]"),
        (lambda parts: parts.update({"-1.0": parts.pop("25.0")}), "before the leaf begins"),
        (lambda parts: parts["25.0"].update(shape="x"), "part 25.0 has the shape x"),
        (lambda parts: parts.update({"../25.0": parts.pop("25.0")}), "not understood"),
        (lambda parts: parts["25.0"].pop("sha256"), "not understood"),
    ],
)
def test_parts_that_do_not_make_up_the_leaf_are_refused(tmp_path, change, message):
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    change(manifest["llm/embed/embedding"]["parts"])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_tree(tmp_path)


def test_what_a_process_has_not_written_is_named():
    shapes = {path: leaf.shape for path, leaf in LEAVES.items()}
    with pytest.raises(CheckpointError, match="qformer/temp: they have 0 numbers, the leaf 1"):
        leaf_parts.merge([], shapes)
