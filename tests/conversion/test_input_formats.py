"""Input formats of folders without a record of them, and the notes of exports about them."""

import json

import pytest

from jax_instructblip.conversion.input_formats import (
    changed_image_settings,
    lost_input_format,
    usual_input_format,
)
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.models.released import get_variant

V1, V1_5 = get_variant("llava-7b"), get_variant("llava-1.5-7b")


def write_tokens(folder, *tokens, name="tokenizer.json"):
    listed = [{"content": token, "id": index} for index, token in enumerate(tokens)]
    (folder / name).write_text(json.dumps({"added_tokens": listed}))
    return folder


@pytest.mark.parametrize("name", ["instructblip-vicuna-7b", "blip2-opt-2.7b", "blip2-stage1"])
def test_other_models_have_no_template(tmp_path, name):
    write_tokens(tmp_path, "<|im_start|>", "<|im_end|>")
    assert usual_input_format(get_variant(name), tmp_path, {}) == InputFormat()


LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.mark.parametrize(
    ("tokens", "family", "template"),
    [
        ((), "llama", "v1"),
        (("<s>", "</s>", "<image>"), "llama", "v1"),
        (("<s>", "</s>"), "mistral", "mistral"),
        (("<s>", "</s>", "[INST]", "[/INST]"), "mistral", "mistral_v3"),
        (LLAMA3, "llama", "llama3"),
        (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "qwen2", "chatml"),
        (("<|endoftext|>", "<|im_end|>"), "qwen2", "v1"),
    ],
)
def test_the_template_is_that_of_the_language_model(tmp_path, tokens, family, template):
    facts = {"config": {"text_config": {"model_type": family}}}
    write_tokens(tmp_path, *tokens)
    assert usual_input_format(V1, tmp_path, facts).template == template


@pytest.mark.parametrize(
    ("preprocessor", "processor", "crops"),
    [
        (None, None, ("clip", "pad")),  # LLaVA v1, v1.5
        ({"do_center_crop": True}, None, ("clip", "clip")),
        ({"do_center_crop": True, "do_pad": False}, None, ("clip", "clip")),
        ({"do_center_crop": True, "do_pad": True}, None, ("pad", "pad")),
        (None, {"image_processor": {"do_center_crop": True, "do_pad": True}}, ("pad", "pad")),
        (None, {"patch_size": 14}, ("clip", "pad")),
        ({"size": {"shortest_edge": 224}}, None, ("clip", "pad")),
    ],
)
def test_images_are_prepared_as_the_folder_says(tmp_path, preprocessor, processor, crops):
    facts = {"preprocessor_config": preprocessor, "processor_config": processor}
    facts = {name: document for name, document in facts.items() if document is not None}
    for variant, crop in zip((V1, V1_5), crops, strict=True):
        assert usual_input_format(variant, tmp_path, facts).image_crop == crop


CLIP = {"do_center_crop": True, "image_processor_type": "CLIPImageProcessor", "mine": 3}


@pytest.mark.parametrize("crop", ["clip", "pad", "squash"])
def test_an_export_prepares_images_as_the_model_does(tmp_path, crop):
    form = InputFormat("v1", image_crop=crop)
    sides = {
        "preprocessor_config": dict(CLIP),
        "processor_config": {"image_processor": dict(CLIP), "a": 1},
    }
    changed = changed_image_settings(V1_5, form, sides)
    assert (changed == {}) == (crop == "clip")  # an export changes no file without need
    after = sides | changed
    for document in (
        after["preprocessor_config"],
        after["processor_config"]["image_processor"],
    ):
        assert document["mine"] == 3
        assert document.get("do_pad", False) == (crop == "pad")
        assert document["do_center_crop"] == (crop != "squash")
    assert after["processor_config"]["a"] == 1
    if crop != "squash":
        assert usual_input_format(V1_5, tmp_path, after).image_crop == crop


def test_an_export_says_what_the_format_cannot_hold(tmp_path):
    facts = {"preprocessor_config": dict(CLIP)}
    usual = usual_input_format(V1_5, tmp_path, facts)
    assert lost_input_format(V1_5, usual, tmp_path, facts) == []
    form = InputFormat("v0", "Be brief.", image_crop="clip")
    (note,) = lost_input_format(V1_5, form, tmp_path, facts)
    assert "asked (template 'v0', system 'Be brief.'): say it again (--template)" in note
