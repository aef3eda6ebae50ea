import dataclasses
import json

import jax
import pytest

from jax_instructblip.models.released import VARIANTS, get_variant, released_name, size_differences
from jax_instructblip.models.variants import ProjectorConfig, Variant
from jax_instructblip.models.vlm import param_shapes

# FlanT5-XL, FlanT5-XXL, Vicuna-7B and Vicuna-13B have 2.850, 11.135, 6.738 and 13.016 billion.
RELEASED = {
    "instructblip-flan-t5-xl": (187_262_464, 2_849_757_184),
    "instructblip-flan-t5-xxl": (188_837_376, 11_135_332_352),
    "instructblip-vicuna-7b": (188_837_376, 6_738_423_808),
    "instructblip-vicuna-13b": (189_624_832, 13_015_874_560),
}
LEAF_NAMES = "kernel bias scale embedding queries cls pos_embed relative_bias temp".split()


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", RELEASED)
def test_released_variants_have_the_published_sizes(name):
    shapes = param_shapes(get_variant(name))
    found = {tower: count(tree) for tower, tree in shapes.items()}
    qformer, llm = RELEASED[name]
    assert found == {"vision": 985_894_528, "qformer": qformer, "llm": llm}
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes):
        assert path[-1].key in LEAF_NAMES


def test_clip_vit_l_as_released():
    """Its 23 of 24 blocks, with a norm before them and none behind."""
    shapes = param_shapes(get_variant("blip2-stage1-vit-l"))
    block = 4 * 1024**2 + 4 * 1024 + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024
    outside = 1024 + 257 * 1024 + 3 * 14 * 14 * 1024 + 2 * 1024
    assert count(shapes["vision"]) == 23 * block + outside == 290_581_504
    cross = shapes["qformer"]["layers"]["cross"]["cross_attention"]
    assert cross["key"]["kernel"].shape == (6, 1024, 12, 64)
    assert "bias" in shapes["vision"]["layers"]["attention"]["key"]
    assert "bias" not in shapes["vision"]["patch_embed"]
    second = param_shapes(get_variant("blip2-flan-t5-xl-vit-l"))
    assert count(second["vision"]) == 290_581_504


@pytest.mark.parametrize("kind", ["t5", "vicuna", "opt"])
def test_layers_are_stacked_on_axis_0(kind):
    variant = get_variant(f"tiny-{kind}")
    shapes = param_shapes(variant)
    layers = {leaf.shape[0] for leaf in jax.tree.leaves(shapes["vision"]["layers"])}
    assert layers == {variant.vision.layers}
    layers = {leaf.shape[0] for leaf in jax.tree.leaves(shapes["qformer"]["layers"])}
    assert layers == {variant.qformer.layers // 2}  # pairs: with and without cross-attention
    assert "key" in shapes["vision"]["layers"]["attention"]
    assert "bias" not in shapes["vision"]["layers"]["attention"]["key"]


def test_a_blind_qformer_has_no_text_branch():
    variant = get_variant("instructblip-flan-t5-xl").replace(**{"qformer.instruction_aware": False})
    shapes = param_shapes(variant)["qformer"]
    assert count(shapes) == 106_739_968  # the trainable part of stage 2 for FlanT5-XL
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    assert not [path for path in paths if "text" in path or "position" in path]


@pytest.mark.parametrize("name", VARIANTS)
def test_to_dict_survives_json(name):
    variant = get_variant(name)
    assert Variant.from_dict(json.loads(json.dumps(variant.to_dict()))) == variant


def test_from_dict_names_unknown_and_missing_fields():
    fields = get_variant("tiny-vicuna").to_dict()
    fields["llm"]["depth"] = fields["llm"].pop("layers")
    with pytest.raises(ValueError, match=r"llm: unknown fields \['depth'\], missing .*'layers'"):
        Variant.from_dict(fields)
    with pytest.raises(ValueError, match="llm.kind is 'gpt'.*llama, opt, t5"):
        Variant.from_dict({**fields, "llm": {"kind": "gpt"}})


def test_replace_changes_dotted_fields_and_suggests_names():
    variant = get_variant("tiny-t5").replace(**{"qformer.dropout": 0.0, "llm.dropout": 0.3})
    assert (variant.qformer.dropout, variant.llm.dropout) == (0.0, 0.3)
    with pytest.raises(ValueError, match="'qformer.dropuot'; did you mean qformer.dropout"):
        variant.replace(**{"qformer.dropuot": 0.0})
    with pytest.raises(ValueError, match="'llm.dropout': a model of kind blip2_stage1 has vision"):
        get_variant("tiny-stage1").replace(**{"llm.dropout": 0.0})


def test_towers_that_do_not_fit_are_all_listed():
    with pytest.raises(ValueError) as caught:
        get_variant("tiny-vicuna").replace(
            **{"vision.width": 90, "vision.image_size": 60, "qformer.layers": 3, "llm.width": 66}
        )
    for part in (
        "qformer.vision_width 88 != vision.width 90",
        "qformer.llm_width 64 != llm.width 66",
        "qformer.layers 3 is odd",
        "vision.image_size 60 is no multiple of patch_size 14",
        "vision.width 90 is not divisible by 4 heads",
        "llm.width 66 is not divisible by 4 heads",
    ):
        assert part in str(caught.value)


def test_fields_of_llama_that_do_not_fit_are_named():
    known = get_variant("tiny-vicuna")
    with pytest.raises(ValueError, match="llm.heads 4 is no multiple of key_value_heads 3"):
        known.replace(**{"llm.key_value_heads": 3})
    with pytest.raises(ValueError, match="llm.head_width 5 is odd"):
        known.replace(**{"llm.head_size": 5})
    free = known.replace(**{"llm.heads": 5, "llm.head_size": 6})  # 64 is no multiple of 5
    assert free.llm.head_width == 6 and free.llm.cached_heads == 5
    assert known.replace(**{"llm.sliding_window": 7}).llm.longest_sample == 7


def test_a_checkpoint_without_the_newer_fields_of_llama():
    fields = get_variant("tiny-vicuna").to_dict()
    for name in list(fields["llm"]):
        if name.startswith(("key_", "rope_", "head_", "tied", "sliding")) and name != "rope_theta":
            del fields["llm"][name]
    assert "heads" in fields["llm"] and len(fields["llm"]) == 13
    assert Variant.from_dict(fields) == get_variant("tiny-vicuna")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'instructblip-vicuna-7b'"):
        get_variant("instructblip-vicuna7b")


def projected(**fields) -> Variant:
    known = get_variant("tiny-vicuna")
    bridge = ProjectorConfig(known.vision.width, known.llm.width, **fields)
    return Variant("llava", known.vision, bridge, known.llm)


def test_a_projector_gives_every_patch_but_cls_and_has_no_qformer():
    variant = projected()
    assert variant.visual_tokens == (56 // 14) ** 2
    assert not variant.reads_instruction and list(variant.towers) == ["vision", "projector", "llm"]
    assert Variant.from_dict(json.loads(json.dumps(variant.to_dict()))) == variant
    assert variant.replace(**{"projector.layers": 1}).bridge.layers == 1
    with pytest.raises(ValueError, match="kind llava has no Q-Former but a projector"):
        _ = variant.qformer
    with pytest.raises(ValueError, match="projector.layers is 3, expected 1 or 2"):
        projected(layers=3)


def test_a_kind_has_its_bridge_and_its_language_model():
    known = get_variant("tiny-t5")
    blind = dataclasses.replace(known.qformer, instruction_aware=False)
    for kind, bridge, llm, complaint in (
        ("llava", known.bridge, known.llm, "kind llava has a projector"),
        ("instructblip", projected().bridge, known.llm, "kind instructblip has a qformer"),
        ("blip2", known.bridge, known.llm, "blip2 does not read the instruction"),
        ("blip2", blind, None, "kind blip2 cannot have no language model"),
        ("blip2_stage1", blind, known.llm, "kind blip2_stage1 cannot have a language model"),
        ("blip3", known.bridge, known.llm, "kind is 'blip3', expected one of instructblip"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Variant(kind, known.vision, bridge, llm)
    with pytest.raises(ValueError, match="blip2_stage1 reads texts .* has a feature_width"):
        Variant("blip2_stage1", known.vision, blind, None)
    stage1 = get_variant("tiny-stage1")
    assert Variant.from_dict(json.loads(json.dumps(stage1.to_dict()))) == stage1
    assert list(stage1.towers) == ["vision", "qformer"]


def test_a_description_without_kind_is_of_instructblip():
    variant = get_variant("tiny-t5")
    fields = variant.to_dict()
    assert fields.pop("kind") == "instructblip"
    assert Variant.from_dict(fields) == variant
    for name in ("vision", "qformer", "llm"):
        with pytest.raises(ValueError, match=f"missing fields .*{name}"):
            Variant.from_dict({key: value for key, value in fields.items() if key != name})
    with pytest.raises(ValueError, match=r"unknown fields \['lora'\]"):
        Variant.from_dict({**fields, "lora": {}})


@pytest.mark.parametrize(
    ("tower", "field", "value"),
    [
        ("vision", "width", "88"),
        ("vision", "norm_eps", float("nan")),
        ("vision", "layers", -4),
        ("qformer", "queries", 2.5),
        ("qformer", "instruction_aware", 1),
        ("qformer", "dropout", None),
        ("llm", "vocab", True),
        ("llm", "activation", "relu6"),
    ],
)
def test_from_dict_refuses_values_of_another_type(tower, field, value):
    fields = get_variant("tiny-t5").to_dict()
    fields[tower][field] = value
    with pytest.raises(ValueError, match=rf"{tower}\.{field} is .*, expected"):
        Variant.from_dict(fields)
    fields = get_variant("tiny-t5").to_dict()
    with pytest.raises(ValueError, match="variant.vision is 3, expected an object"):
        Variant.from_dict({**fields, "vision": 3})


@pytest.mark.parametrize("name", VARIANTS)
def test_a_released_model_is_known_by_kind_and_sizes_alone(name):
    variant = get_variant(name)
    own = {"llm.vocab": 32003, "qformer.vocab": 30522, "qformer.dropout": 0.0}
    own |= {"llm.eos_id": 5, "llm.norm_eps": 1e-5, "qformer.image_norm_eps": 1e-6}
    own = {field: own[field] for field in own if field.partition(".")[0] in variant.towers}
    assert released_name(variant.replace(**own)) == name
    fields = [
        f"{tower}.{field.name}"
        for tower, config in variant.towers.items()
        for field in dataclasses.fields(config)
        if field.type is int and field.name != "vocab" and not field.name.endswith("_id")
    ]
    assert len(fields) >= 15
    for field in fields:
        tower, _, size = field.partition(".")
        value = getattr(variant.towers[tower], size)
        changed = variant.towers[tower]
        double = 2 * value or 7
        object.__setattr__(changed := dataclasses.replace(changed), size, double)
        attribute = "bridge" if tower == variant.bridge.key else tower
        other = dataclasses.replace(variant)
        object.__setattr__(other, attribute, changed)
        assert released_name(other) == "", field
        assert size_differences(other, variant) == [f"{field}: expected {value}, found {double}"]


# As the papers count what is trained: 188M, 107M, 108M.
@pytest.mark.parametrize(
    ("name", "trained", "count"),
    [
        ("blip2-stage1", ("qformer", "heads"), 186_705_470),
        ("blip2-flan-t5-xl", ("qformer",), 106_739_968),
        ("blip2-flan-t5-xxl", ("qformer",), 108_314_880),
        ("blip2-vicuna-7b", ("qformer",), 108_314_880),
        ("blip2-opt-2.7b", ("qformer",), 107_133_696),
        ("blip2-opt-6.7b", ("qformer",), 108_314_880),
    ],
)
def test_what_is_trained_has_the_released_number_of_parameters(name, trained, count):
    shapes = param_shapes(get_variant(name))
    assert sum(leaf.size for part in trained for leaf in jax.tree.leaves(shapes[part])) == count


def test_blip2_of_the_same_sizes_is_no_instructblip():
    known = get_variant("instructblip-flan-t5-xl")
    blind = dataclasses.replace(known.qformer, instruction_aware=False)
    assert released_name(known.replace(**{"qformer.instruction_aware": False})) == ""
    assert released_name(Variant("blip2", known.vision, blind, known.llm)) == "blip2-flan-t5-xl"
    narrow = dataclasses.replace(get_variant("blip2-stage1").qformer, feature_width=128)
    assert released_name(Variant("blip2_stage1", known.vision, narrow, None)) == ""
    assert released_name(projected()) == ""
