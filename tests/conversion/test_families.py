from typing import Any

import pytest

from jax_instructblip.conversion import families
from jax_instructblip.conversion.families import FAMILIES, family_of
from jax_instructblip.conversion.hf_config import find_family, variant_of
from jax_instructblip.models.released import VARIANTS, get_variant
from jax_instructblip.models.variants import LlamaConfig, ProjectorConfig, Variant

READS = {"use_qformer_text_input": True}


@pytest.mark.parametrize("name", [name for name in VARIANTS if "vit-l" not in name])
def test_a_config_that_is_written_is_read_again(name, tmp_path):
    """No tokenizer here: LLaMA's ids are the released ones."""
    variant = get_variant(name).replace(**{"vision.norm_eps": 1e-4})
    if variant.bridge.key == "qformer":
        variant = variant.replace(
            **{"qformer.image_norm_eps": 1e-4, "qformer.queries": 5, "qformer.dropout": 0.3}
        )
    if variant.llm is None:
        fields = {"qformer.feature_width": 9, "qformer.caption_head": False}
    elif variant.llm.encoder_decoder:
        fields = {"llm.activation": "silu", "llm.scale_decoder_outputs": True, "llm.eos_id": 9}
    elif variant.llm.kind == "opt":
        fields = {"llm.max_positions": 77, "llm.bos_id": 3, "llm.eos_id": 9, "llm.pad_id": 4}
    else:
        fields = {"llm.rope_theta": 5e5, "llm.max_positions": 77, "llm.tied_head": True}
        # Without a tokenizer the ids are the defaults.
        fields |= {f"llm.{key}": getattr(LlamaConfig, key) for key in ("bos_id", "pad_id")}
        if variant.kind == "llava":
            fields |= {"llm.bos_id": 1, "llm.pad_id": 0}  # LLaMA's own <s> and <unk>
    if variant.llm is not None:
        fields |= {"llm.dropout": 0.2}
        fields |= {} if variant.llm.kind == "opt" else {"llm.norm_eps": 1e-4}  # it has no such key
    variant = variant.replace(**fields)
    assert variant_of(tmp_path, family_of(variant).config(variant)) == variant


LLAMA3: dict[str, Any] = {
    "llm.key_value_heads": 2,
    "llm.rope_scaling": "llama3",
    "llm.rope_factor": 8.0,
}
KEYS: list[tuple[str, dict[str, Any]]] = [
    ("tiny-t5", {}),
    ("tiny-vicuna", {}),
    ("tiny-vicuna", LLAMA3),
    ("tiny-vicuna", {"llm.rope_scaling": "linear", "llm.sliding_window": 9}),
    ("tiny-vicuna", {"llm.key_bias": True, "llm.sliding_window": 9}),
    ("tiny-vicuna", {"llm.key_norm": True, "llm.head_size": 6}),
    ("tiny-opt", {}),
    ("tiny-stage1", {}),
    ("llava-7b", {}),
    ("llava-1.5-13b", LLAMA3),
]


@pytest.mark.parametrize(("name", "fields"), KEYS, ids=str)
def test_every_key_that_is_written_is_read(name, fields, tmp_path):
    """A key that is written and ignored would be a fact that is lost on the way back."""
    variant = get_variant(name).replace(**fields)
    family = family_of(variant)
    written = family.config(variant)
    llama = isinstance(variant.llm, LlamaConfig)
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"} if llama else set()
    for section, keys in written.items():
        for key in keys if isinstance(keys, dict) else ():
            if key in ids or (key == "model_type" and section != "text_config"):
                continue
            changed = {**written, section: {**keys, key: "nonsense"}}
            with pytest.raises(ValueError, match=f"{section}.{key} is 'nonsense'"):
                variant_of(tmp_path, changed)


def test_an_eps_that_opt_cannot_say_is_refused():
    variant = get_variant("tiny-opt").replace(**{"llm.norm_eps": 1e-4})
    with pytest.raises(ValueError, match="llm.norm_eps is 0.0001: an OPT folder"):
        family_of(variant).config(variant)


@pytest.mark.parametrize("name", ["blip2-stage1-vit-l", "blip2-flan-t5-xl-vit-l"])
def test_the_image_tower_of_clip_is_refused(name):
    variant = get_variant(name)
    with pytest.raises(ValueError, match="image tower is CLIP ViT-L"):
        family_of(variant).config(variant)


def test_features_that_no_model_of_transformers_has_together_are_refused():
    variant = get_variant("tiny-vicuna").replace(**{"llm.key_bias": True, "llm.key_norm": True})
    with pytest.raises(ValueError, match="key_bias and key_norm: no language model of transf"):
        family_of(variant).config(variant)


def test_a_kind_without_an_architecture_is_named(monkeypatch):
    known = get_variant("tiny-t5")
    assert family_of(known) is FAMILIES[0]
    monkeypatch.setattr(families, "FAMILIES", FAMILIES[1:])
    with pytest.raises(ValueError, match="of kind 'instructblip'; there are those of blip2, blip2"):
        family_of(known)


def test_an_image_tower_that_llava_does_not_have_is_refused():
    known = get_variant("tiny-vicuna")
    projector = ProjectorConfig(known.vision.width, known.llm.width)
    variant = Variant("llava", known.vision, projector, known.llm)
    with pytest.raises(ValueError, match="image tower is not CLIP's with its last block and norm"):
        family_of(variant).config(variant)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["Blip2ForImageTextRetrieval"]}, "blip2_stage1"),
        ({"architectures": ["Blip2ForConditionalGeneration"]}, "blip2"),
        ({"model_type": "blip-2"}, "blip2"),
        (
            {"model_type": "blip-2", "qformer_config": {"use_qformer_text_input": True}},
            "blip2_stage1",
        ),
        ({"model_type": "blip-2", "qformer_config": 3}, "blip2"),
        ({"model_type": "instructblip", "qformer_config": None}, "instructblip"),
    ],
)
def test_two_architectures_of_one_type_are_told_apart(config, kind):
    assert find_family(config).kind == kind


def test_another_architecture_names_what_is_supported(tmp_path):
    with pytest.raises(ValueError, match=r"\['Other'\]; supported: InstructBlip"):
        variant_of(tmp_path, {"architectures": ["Other"]})
