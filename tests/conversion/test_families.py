import dataclasses

import pytest

from jax_instructblip.conversion.families import FAMILIES, family_of
from jax_instructblip.conversion.hf_config import variant_of
from jax_instructblip.models.variants import VARIANTS, Variant, get_variant


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_that_is_written_is_read_again(name, tmp_path):
    """No tokenizer here: LLaMA's ids are the released ones."""
    variant = get_variant(name).replace(
        **{
            "vision.norm_eps": 1e-5,
            "qformer.image_norm_eps": 1e-5,
            "qformer.queries": 5,
            "qformer.dropout": 0.3,
            "llm.dropout": 0.2,
            "llm.norm_eps": 1e-4,
        }
    )
    if variant.llm.encoder_decoder:
        fields = {"llm.activation": "silu", "llm.scale_decoder_outputs": True, "llm.eos_id": 9}
    else:
        fields = {"llm.rope_theta": 5e5, "llm.max_positions": 77}
    variant = variant.replace(**fields)
    assert variant_of(tmp_path, family_of(variant).config(variant)) == variant


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-vicuna"])
def test_every_key_that_is_written_is_read(name, tmp_path):
    """A key that is written and ignored would be a fact that is lost on the way back."""
    variant = get_variant(name)
    family = family_of(variant)
    written = family.config(variant)
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"} if name == "tiny-vicuna" else set()
    for section, keys in written.items():
        for key in keys if isinstance(keys, dict) else ():
            if key == "model_type" or key in ids:
                continue
            changed = {**written, section: {**keys, key: "nonsense"}}
            with pytest.raises(ValueError, match=f"{section}.{key} is 'nonsense'"):
                variant_of(tmp_path, changed)


def test_a_kind_without_an_architecture_is_named():
    known = get_variant("tiny-t5")
    assert family_of(known) is FAMILIES[0]
    blind = dataclasses.replace(known.qformer, instruction_aware=False)
    with pytest.raises(ValueError, match="known for a model of kind 'blip2'; there are those of"):
        family_of(Variant("blip2", known.vision, blind, known.llm))


def test_another_architecture_names_what_is_supported(tmp_path):
    with pytest.raises(ValueError, match=r"\['Other'\]; supported: InstructBlip"):
        variant_of(tmp_path, {"architectures": ["Other"]})
