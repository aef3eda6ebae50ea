"""Folders of CLIP, with and without the text tower; other folders are refused."""

import json

import pytest

from jax_instructblip.conversion.clip_folder import open_clip
from jax_instructblip.conversion.safetensors import ConversionError
from tests.helpers.llava_folders import VISION

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
transformers = pytest.importorskip("transformers")

TEXT = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize("whole", [True, False], ids=["CLIPModel", "CLIPVisionModel"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_folders_that_transformers_saves(tmp_path, whole, safe):
    vision = transformers.CLIPVisionConfig(**VISION)
    if whole:
        config = transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=TEXT)
        model = transformers.CLIPModel(config)
        tower = model.vision_model
    else:
        model = tower = transformers.CLIPVisionModel(vision)
    model.save_pretrained(tmp_path)
    if not safe:
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    clip = open_clip(tmp_path)
    assert (clip.config.width, clip.config.layers, clip.config.computed_layers) == (24, 4, 3)
    assert clip.config.activation == "quick_gelu" and clip.config.pre_norm
    names = {f"vision_model.{name}" for name in tower.state_dict()}
    assert clip.tensors.keys() - {"vision_model.embeddings.position_ids"} == names
    assert ("text_model.*" in clip.dropped) is whole
    assert open_clip(tmp_path, weights=False).tensors == {}


def test_what_is_no_clip(tmp_path):
    with pytest.raises(ConversionError, match=r"no folder of an image tower(.|\n)*pytorch_model"):
        open_clip(tmp_path)
    path = tmp_path / "config.json"
    for document, said in (
        ({"model_type": "siglip"}, "no folder of CLIP(.|\n)*'siglip'; supported: clip, clip_v"),
        ({"model_type": "clip", "vision_config": {"hidden_act": "silu"}}, "hidden_act is 'silu'"),
        ({"model_type": "clip_vision_model", "quantization_config": 4}, "quantization_config is"),
        ({"model_type": "clip_vision_model"}, "no weights of the image tower"),
    ):
        path.write_text(json.dumps(document))
        with pytest.raises(ConversionError, match=said):
            open_clip(tmp_path)
