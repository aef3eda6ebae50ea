import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jax_instructblip.checkpoint import trees
from jax_instructblip.models import quantise
from jax_instructblip.models.released import VARIANTS, get_variant
from jax_instructblip.models.vlm import param_shapes
from jax_instructblip.parallel import rules
from jax_instructblip.parallel.mesh import AXES, make_mesh
from jax_instructblip.training import initial
from jax_instructblip.training.optimizer import adamw
from jax_instructblip.training.state import create_state, partition
from tests.helpers.multi_device import in_a_process
from tests.helpers.tiny import write_base

RELEASED = sorted(name for name in VARIANTS if not name.startswith("tiny"))
SIZES = [(1, 8, 1), (1, 1, 4), (1, 1, 8), (2, 2, 2), (1, 64, 1), (4, 16, 4)]
BOTH = ("fsdp", "tensor")
CALLS = ("shares", "programs", "restores", "words")  # of a process with eight devices


def shapes_of(name):
    return param_shapes(get_variant(name))


def mesh_of(*sizes):
    return AbstractMesh(sizes, AXES)


def state_shapes(variant, trainable=("qformer",)):
    """State and frozen weights, as shapes."""
    chosen, frozen = partition(param_shapes(variant), trainable)
    optimizer = adamw(lambda _: 1e-3)
    return jax.eval_shape(lambda tree: create_state(tree, optimizer), chosen), frozen


def specs(tree, mesh):
    placed = jax.tree_util.tree_leaves_with_path(rules.shardings(tree, mesh))
    return {rules.path_of(path): sharding.spec for path, sharding in placed}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_leaf_of_every_variant_has_a_rule(name):
    variant = get_variant(name)
    assert rules.shardings(param_shapes(variant), mesh_of(1, 1, 1))
    if variant.kind == "instructblip":
        variant = variant.replace(**{"qformer.instruction_aware": False})
        assert rules.shardings(param_shapes(variant), mesh_of(1, 1, 1))


def test_a_trained_language_model_and_its_moments_lie_in_parts():
    """Only the token embedding is whole over `fsdp`, where its words are looked up."""
    state, _ = state_shapes(get_variant("llava-13b"), ("projector", "llm"))
    placed = specs(state, mesh_of(1, 16, 1))
    whole = {path for path, spec in placed.items() if "fsdp" not in str(spec)}
    small = {path for path in whole if path.endswith(("scale", "bias", "step", "count"))}
    assert whole - small == {"params/llm/embed/embedding"}


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_released_sizes_can_be_divided(name, sizes):
    tree = shapes_of(name)
    for path, spec in specs(tree, mesh_of(*sizes)).items():
        shape = trees.flatten(tree)[path].shape
        assert len(spec) in (0, len(shape)), path


def test_every_rule_is_of_use():
    paths = set()
    for name in RELEASED:
        heads = ("heads",) if name == "blip2-stage1" else ()
        variant = get_variant(name)
        llm = ("llm",) if variant.kind == "llava" else ()
        state, frozen = state_shapes(variant, (variant.bridge.key, *heads, *llm))
        leaves = jax.tree_util.tree_leaves_with_path((state._asdict(), frozen))
        paths |= {rules.path_of(path) for path, _ in leaves}
    first = lambda path: next(r for r in rules.RULES if re.search(f"(^|/)({r.path})$", path))
    assert {first(path) for path in paths} == set(rules.RULES)


# What Megatron's and FSDP's splits are on the released layouts, axis by axis; [Y, ...] is stacked.
@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("vision/layers/attention/query/kernel", P(None, "fsdp", "tensor", None)),
        ("vision/layers/attention/out/kernel", P(None, "tensor", None, "fsdp")),
        ("vision/layers/mlp/in/kernel", P(None, "fsdp", "tensor")),
        ("vision/layers/mlp/out/kernel", P(None, "tensor", "fsdp")),
        ("vision/patch_embed/kernel", P()),
        ("vision/layers/mlp/in/bias", P()),
        ("vision/pos_embed", P()),
        ("qformer/layers/cross/cross_attention/key/kernel", P(None, "fsdp", "tensor", None)),
        ("qformer/layers/plain/text_mlp/out/kernel", P(None, "tensor", "fsdp")),
        ("qformer/text_embed/embedding", P(None, "tensor")),
        ("qformer/projection/kernel", P("fsdp", "tensor")),
        ("qformer/queries", P()),
        ("llm/decoder/layers/cross_attention/value/kernel", P(None, "fsdp", "tensor", None)),
        ("llm/encoder/layers/mlp/gate/kernel", P(None, "fsdp", "tensor")),
        ("llm/head/kernel", P("fsdp", "tensor")),
        ("llm/embed/embedding", P(None, "tensor")),
        ("llm/encoder/relative_bias", P()),
    ],
)
def test_axes(path, spec):
    assert specs(shapes_of("instructblip-flan-t5-xl"), mesh_of(2, 4, 4))[path] == (spec)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantised_kernels_are_split_like_the_kernels_they_stand_for(form):
    plain, mesh = shapes_of("instructblip-vicuna-7b"), mesh_of(1, 4, 4)
    small = quantise.shapes(plain, form)
    found, expected = specs(small, mesh), specs(plain, mesh)
    kernels = {path for path in found if path.endswith("kernel/q")}
    assert len(kernels) == 6 + 7  # of the vision tower's layers, of the language model's
    assert {path: found[f"{path}"] for path in kernels} == {
        path: expected[path.removesuffix("/q")] for path in kernels
    }
    # Scales where they can be: not along an axis of which there is one for all.
    t5 = specs(quantise.shapes(shapes_of("instructblip-flan-t5-xl"), form), mesh)
    assert t5["llm/encoder/layers/mlp/out/kernel/input_scale"] == P(None, "tensor", None)
    up = "llm/layers/mlp/in/kernel/scale"
    assert found[up] == P(None, None if form == "int8" else "fsdp", "tensor")
    assert found["vision/layers/attention_norm/scale"] == P()


def test_second_choices_are_taken_and_told():
    heads = "qformer/layers/cross/attention/query/kernel"
    vicuna = shapes_of("instructblip-vicuna-7b")
    assert specs(vicuna, mesh_of(1, 1, 8))[heads] == P(None, BOTH, None, None)
    assert specs(vicuna, mesh_of(1, 1, 8))["llm/head/kernel"] == P(BOTH, None)
    told = "\n".join(rules.remarks(vicuna, mesh_of(1, 1, 8)))
    assert f"axis 2 of 12 does not divide by tensor=8; split as (None, {BOTH}, None, None)" in told
    assert f"axis 1 of 32001 does not divide by tensor=8; split as ({BOTH}, None)" in told
    assert "qformer/layers/cross/attention/key/kernel, 9 leaves" in told
    assert rules.remarks(vicuna, mesh_of(2, 4, 1)) == []
    assert rules.remarks(shapes_of("instructblip-flan-t5-xl"), mesh_of(1, 2, 4)) == ([])


def test_few_key_heads_are_split_by_width():
    """Queries are split by heads over `tensor`; keys and values of two heads cannot be."""
    variant = get_variant("tiny-vicuna").replace(**{"llm.key_value_heads": 2})
    found = specs(param_shapes(variant)["llm"], mesh_of(1, 2, 4))
    assert found["layers/attention/query/kernel"] == P(None, "fsdp", "tensor", None)
    for name in ("key", "value"):
        assert found[f"layers/attention/{name}/kernel"] == P(None, BOTH, None, None)
    found = specs(param_shapes(variant)["llm"], mesh_of(1, 2, 2))
    assert found["layers/attention/key/kernel"] == P(None, "fsdp", "tensor", None)


def test_moments_lie_where_their_weights_do():
    state, _ = state_shapes(get_variant("instructblip-flan-t5-xl"), ("vision", "qformer"))
    found = specs(state, mesh_of(1, 8, 1))
    weights = {
        path.removeprefix("params/"): spec for path, spec in found.items() if "params" in path
    }
    for moment in ("mu", "nu"):
        prefix = f"optimizer/0/{moment}/"
        moments = {
            p.removeprefix(prefix): spec for p, spec in found.items() if p.startswith(prefix)
        }
        assert moments == weights
    assert found["step"] == found["optimizer/0/count"] == P()


@pytest.mark.parametrize(
    ("sizes", "whole"),
    [((1, 8, 1), ["llm/embed/embedding", "qformer/text_embed/embedding"]), ((1, 1, 8), [])],
    ids=str,
)
def test_only_tables_of_words_are_big_and_whole(sizes, whole):
    leaves = trees.flatten(shapes_of("instructblip-vicuna-13b"))
    placed = trees.flatten(rules.shardings(shapes_of("instructblip-vicuna-13b"), mesh_of(*sizes)))
    is_whole = lambda path: placed[path].shard_shape(leaves[path].shape) == leaves[path].shape
    assert sorted(path for path in leaves if leaves[path].size > 1e6 and is_whole(path)) == whole


def test_refuses_what_no_rule_names_and_what_does_not_divide():
    tree = {
        "llm": {"layers": {"attention": {"query": {"kernel": jnp.zeros((2, 8, 6, 4))}}}},
        "qformer": {"gizmo": {"kernel": jnp.zeros((3, 4))}, "head": {"kernel": jnp.zeros((9, 7))}},
    }
    with pytest.raises(ValueError) as caught:
        rules.shardings(tree, mesh_of(1, 2, 4))
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 leaves cannot be laid over the mesh:"
    assert "llm/layers/attention/query/kernel [2, 8, 6, 4]: axis 2 of 6 does not divide" in lines[1]
    assert "by tensor=4 (rule '(cross_)?attention/query/kernel')" in lines[1]
    assert "qformer/gizmo/kernel [3, 4]: no rule says how it is split" in lines[2]
    assert "axis 0 of 9 does not divide by fsdp=2; axis 0 of 9 does not divide by" in lines[3]
    assert "fsdp=2 x tensor=4" in lines[3]


def test_refuses_another_number_of_axes():
    with pytest.raises(ValueError, match=r"mlp/in/kernel \[2, 4, 8\]: has 3 axes, expected 2"):
        rules.spec_of("mlp/in/kernel", (2, 4, 8), {"fsdp": 1, "tensor": 1})


def test_places_a_leaf_in_its_dtype():
    leaf = np.arange(6.0).reshape(2, 3)
    placed = rules.place("llm/head/kernel", leaf, make_mesh(), jnp.bfloat16)
    assert placed.dtype == jnp.bfloat16 and placed.sharding.spec == P("fsdp", "tensor")
    np.testing.assert_array_equal(placed, leaf)


def test_constrains_no_layer_without_a_mesh():
    layer = {"mlp": {"in": {"kernel": jnp.ones((4, 4))}}}
    assert rules.constrain_layer(layer) is layer


@pytest.fixture(scope="module")
def multi_device():
    return dict(zip(CALLS, in_a_process(*CALLS), strict=True))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize(
    ("sizes", "share"), [((8, 1, 1), 1), ((1, 8, 1), 1 / 8), ((2, 2, 2), 1 / 4), ((1, 2, 4), 1 / 8)]
)
def test_devices_hold_their_share_of_big_leaves(multi_device, kind, sizes, share):
    found = multi_device["shares"][f"{kind} {sizes}"]
    leaves = {"frozen": {"llama": 14, "t5": 25}[kind], "trained": 21, "moments": 42}
    assert found == {name: [count, share] for name, count in leaves.items()}


def test_no_stack_of_layers_is_fetched_whole(multi_device):
    """Under FSDP one layer at a time: a whole tower on every device would not fit."""
    assert multi_device["programs"]["step"]["stacks"] == []
    single = {tuple(shape) for shape in multi_device["programs"]["step"]["others"]}
    assert {(16, 24), (32, 48), (48, 32), (32, 4, 8), (4, 8, 32)} <= single


def test_the_search_sees_stacks_fetched_whole(multi_device):
    found = {tuple(shape) for shape in multi_device["programs"]["hoisted"]["stacks"]}
    assert {(7, 16, 24), (5, 32, 48), (5, 32, 4, 8)} <= found


def test_layers_constrain_their_weights_and_gradients(multi_device):
    found = [tuple(shape) for shape in multi_device["programs"]["constraints"]]
    vision, pair, llm = 6, 20, 7
    # Layers with a backward pass are fetched again for it; the gradient is constrained, too.
    assert len(found) == vision + 3 * pair + 2 * llm
    assert found.count((4, 8, 32)) == 2 and found.count((32, 48)) == 4
    assert found.count((16, 24)) == 1 + 3 * 4  # the ViT's; four in a pair


def test_a_loss_in_chunks_fetches_the_head_once(multi_device):
    found = multi_device["words"]
    assert found["distance"] < 1e-5
    gathered = [times for kind, _, times in found["collectives"] if kind == "all-gather"]
    of_kernel = [times for _, shape, times in found["collectives"] if "f32[16,12]" in shape]
    assert gathered == [1]
    assert of_kernel == [1, 1]  # fetched, and its gradient summed


def test_a_state_is_restored_on_other_devices(multi_device):
    assert len(multi_device["restores"]) == 3
    for case, (same, placed) in multi_device["restores"].items():
        assert same and placed, case


def test_a_mesh_that_does_not_divide_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base")
    monkeypatch.setattr(initial, "read_params", None)
    with pytest.raises(ValueError, match=r"llm/.*query/kernel .*: axis 2 of 3 does not divide by"):
        initial.load_initial(base, mesh=mesh_of(1, 1, 2))


def test_a_second_choice_is_noted_where_weights_are_read(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base")
    monkeypatch.setattr(rules, "remarks", lambda tree, mesh: [f"{len(tree)} towers on {mesh.size}"])
    notes = initial.load_initial(base, mesh=make_mesh(devices=jax.devices()[:1])).notes
    assert "3 towers on 1" in notes
