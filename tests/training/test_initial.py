import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.conversion.positions import resize_positions
from jax_instructblip.models.vlm import param_shapes
from jax_instructblip.training.initial import _fit, load_initial
from tests.helpers.tiny import write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("start") / "base")


@pytest.fixture(scope="module")
def other(tmp_path_factory, base):
    """A checkpoint of the same sizes with other weights."""
    folder = tmp_path_factory.mktemp("start") / "other"
    leaves = checkpoint.flatten(checkpoint.read_tree(base))

    def add(partial):
        (partial / "config.json").write_text((base / "config.json").read_text())

    checkpoint.write_tree(folder, ((path, leaf + 1) for path, leaf in leaves.items()), extra=add)
    return folder


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


def test_splits_casts_and_says_where_from(base):
    initial = load_initial(base, frozen_dtype=jnp.bfloat16)
    assert (sorted(initial.trainable), sorted(initial.frozen)) == (["qformer"], ["llm", "vision"])
    assert dtypes(initial.trainable) == {jnp.dtype("float32")}
    assert dtypes(initial.frozen) == {jnp.dtype("bfloat16")}
    assert initial.base == {
        "name": str(base),
        "path": str(base),
        "sha256": checkpoint.manifest_digest(base),
    }
    assert initial.base["sha256"][:12] in initial.notes[0] and str(base) in initial.notes[1]


def test_frozen_kernels_are_quantised(base):
    initial = load_initial(base, trainable=("vision", "qformer"), quantise="int8")
    assert dtypes(initial.trainable) == {jnp.dtype("float32")}
    kernel = initial.frozen["llm"]["layers"]["mlp"]["gate"]["kernel"]
    assert (kernel["q"].dtype, kernel["scale"].dtype) == (jnp.int8, jnp.float32)
    assert initial.frozen["llm"]["head"]["kernel"].dtype == jnp.bfloat16
    assert "frozen kernels in int8: llm" in initial.notes
    with pytest.raises(ValueError, match="cannot be quantised: vision: it is trained.*llm: it is"):
        load_initial(base, trainable=("vision", "qformer", "llm"), quantise="int8")


def test_values_are_the_checkpoints(base):
    initial = load_initial(base, trainable=("vision", "qformer"), frozen_dtype=jnp.float32)
    found = checkpoint.flatten({**initial.frozen, **initial.trainable})
    for path, leaf in checkpoint.flatten(checkpoint.read_tree(base)).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_init_replaces_what_is_trained(base, other):
    initial = load_initial(base, init=other, frozen_dtype=jnp.float32)
    ours = checkpoint.read_tree(base)
    np.testing.assert_array_equal(
        initial.trainable["qformer"]["queries"], ours["qformer"]["queries"] + 1
    )
    np.testing.assert_array_equal(initial.frozen["vision"]["cls"], ours["vision"]["cls"])
    assert str(other) in initial.notes[1]


def test_an_init_of_other_sizes_lists_all_that_differs(base, tmp_path):
    wide = write_base(tmp_path / "wide", **{"qformer.mlp": 30})
    with pytest.raises(checkpoint.CheckpointError) as error:
        load_initial(base, init=wide)
    message = str(error.value)
    assert "do not fit the model to train (12)" in message
    assert "layers/cross/query_mlp/in/kernel: found (1, 16, 30), expected (1, 16, 28)" in message


def test_without_instructions_the_text_branch_is_left_out(base):
    initial = load_initial(base, fields={"qformer.instruction_aware": False})
    paths = checkpoint.flatten(initial.trainable)
    assert not any("text_" in path or "position_embed" in path for path in paths)
    assert not initial.variant.qformer.instruction_aware
    everything = checkpoint.flatten(load_initial(base).trainable)
    assert f"left out {len(everything) - len(paths)} leaves" in initial.notes[2]
    for name in ("text_embed", "position_embed", "text_mlp", "text_mlp_norm"):
        assert name in initial.notes[2]


def test_nothing_but_the_text_branch_is_left_out(base):
    initial = load_initial(base)
    blind = initial.variant.replace(**{"qformer.instruction_aware": False})
    leaves = checkpoint.flatten(initial.trainable)
    kept, dropped = _fit(initial.trainable, blind, ("qformer",))
    wanted = checkpoint.flatten({"qformer": param_shapes(blind)["qformer"]})
    assert checkpoint.flatten(kept).keys() == wanted.keys()
    assert set(dropped) == leaves.keys() - wanted.keys()
    leaves["qformer/text_more/kernel"] = leaves.pop("qformer/queries")
    with pytest.raises(checkpoint.CheckpointError) as error:
        _fit(checkpoint.unflatten(leaves), blind, ("qformer",))
    assert "qformer/queries: found nothing, expected (1, 7, 16)" in str(error.value)
    assert "qformer/text_more/kernel: found (1, 7, 16), expected nothing" in str(error.value)


def test_float16_is_refused_for_t5_before_weights_are_read(tmp_path):
    folder = write_base(tmp_path / "t5", "t5")
    shutil.rmtree(folder / "params")
    (folder / "files.json").unlink()  # which misses them first
    with pytest.raises(ValueError, match="T5 cannot compute in float16"):
        load_initial(folder, dtype=jnp.float16)


def test_a_text_branch_cannot_be_made_up(tmp_path):
    blind = write_base(tmp_path / "blind", **{"qformer.instruction_aware": False})
    with pytest.raises(checkpoint.CheckpointError, match="text_embed/embedding: found nothing"):
        load_initial(blind, fields={"qformer.instruction_aware": True})


def test_fields_change_the_variant(base):
    initial = load_initial(base, fields={"qformer.dropout": 0.25, "llm.dropout": 0.5})
    assert (initial.variant.qformer.dropout, initial.variant.llm.dropout) == (0.25, 0.5)


def test_an_unknown_part_names_the_nearest(base):
    with pytest.raises(ValueError, match="did you mean 'qformer'"):
        load_initial(base, trainable=("qformr",))


@pytest.mark.parametrize("trainable", [("qformer",), ("vision", "qformer")])
def test_images_of_another_size_resize_the_positions_alone(base, trainable):
    fields = {"vision.image_size": 70}
    initial = load_initial(
        base, fields=fields, trainable=trainable, init=base, frozen_dtype=jnp.float32
    )
    found = checkpoint.flatten({**initial.frozen, **initial.trainable})
    ours = checkpoint.flatten(checkpoint.read_tree(base))
    resized = resize_positions(ours.pop("vision/pos_embed"), 5)
    np.testing.assert_array_equal(found.pop("vision/pos_embed"), resized)
    for path, leaf in ours.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    assert initial.variant.vision.tokens == 26
    (note,) = [each for each in initial.notes if "pos_embed" in each]
    assert "images of 70 pixels a side, the base is of 28" in note


def test_images_that_no_patches_fill_are_refused(base):
    with pytest.raises(ValueError, match="image_size 71 is no multiple of patch_size 14"):
        load_initial(base, fields={"vision.image_size": 71})
