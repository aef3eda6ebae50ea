"""`backbones llava`: the weights of the base, CLIP as in transformers, errors for wrong parts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jax_instructblip import checkpoint
from jax_instructblip.__main__ import main
from jax_instructblip.backbones.llava import write_llava
from jax_instructblip.checkpoint import read_config
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import read_params, read_source
from jax_instructblip.models.vlm import VisionLanguageModel
from tests.helpers.golden_blip2 import normalised
from tests.helpers.language_folders import write_language
from tests.helpers.llava_folders import VISION
from tests.helpers.numerics import error
from tests.helpers.tiny import write_base

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

TEXT = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)


def leaves(path):
    return checkpoint.flatten(read_params(read_source(path), lambda path, array: array))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder of CLIP, a language model of each kind, and bases of both."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config=VISION, text_config={**TEXT, "vocab_size": 40}, projection_dim=8
    )
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(folder / "clip")
    models = {kind: write_language(folder / kind, kind) for kind in ("llama", "qwen2")}
    words = ["backbones", "llava", str(folder / "clip"), str(folder / "one"), "--layers", "1"]
    assert main([*words, "--llm", str(folder / "llama"), "--seed", "3"]) == 0
    write_llava(folder / "clip", folder / "two", llm=folder / "qwen2")
    return folder, clip, models


@pytest.mark.parametrize(("name", "kind"), [("one", "llama"), ("two", "qwen2")])
def test_a_base_is_of_clip_and_a_language_model(parts, name, kind):
    folder, _, models = parts
    variant, ours = read_source(folder / name).variant, leaves(folder / name)
    assert (variant.kind, variant.bridge.layers) == ("llava", 1 if name == "one" else 2)
    assert (variant.vision.layers, variant.vision.computed_layers) == (4, 3)
    theirs = models[kind].state_dict()
    table = theirs["model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(ours["llm/embed/embedding"], table)  # no row is added
    assert ours["projector/in/kernel"].std() > 0.05
    assert read_config(folder / name)["source"]["projector"] == "random"


def test_the_projector_reads_what_clip_gives_before_its_last_block(parts):
    folder, clip, _ = parts
    variant, ours = read_source(folder / "one").variant, leaves(folder / "one")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    params = jax.tree.map(jnp.asarray, checkpoint.unflatten(ours))
    model = VisionLanguageModel(variant)
    found = model.apply({"params": params}, jnp.asarray(pixels[:, None]), method="encode_image")
    with torch.no_grad():
        states = clip.vision_model(
            torch.tensor(normalised(pixels[:, None])), output_hidden_states=True
        ).hidden_states
    assert error(np.asarray(found)[:, 1:], states[-2][:, 1:].numpy()) < 1e-4


@pytest.mark.parametrize(("name", "kind"), [("one", "llama"), ("two", "qwen2")])
def test_the_language_model_keeps_its_special_tokens(parts, name, kind):
    """BLIP-2 would start with `</s>`. LLaMA's tokenizer has no padding: the unknown token is it."""
    folder, _, _ = parts
    variant = read_source(folder / name).variant
    text = TextProcessor.load(folder / name, variant)
    llm, names = variant.llm, text.llm.convert_ids_to_tokens
    expected = ["<s>", "</s>", "<unk>"] if kind == "llama" else ["<|endoftext|>", "<|im_end|>"]
    assert names([llm.bos_id, llm.eos_id, llm.pad_id])[: len(expected)] == expected
    settings = json.loads((folder / name / "tokenizer" / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == ("<unk>" if kind == "llama" else "<|endoftext|>")


def test_a_tower_alone_and_pytorch_files_do_as_well(parts, tmp_path):
    folder, clip, _ = parts
    alone = transformers.CLIPVisionModel(clip.config.vision_config)
    alone.load_state_dict(
        {
            name: clip.state_dict()[name if name in clip.state_dict() else f"vision_model.{name}"]
            for name in alone.state_dict()
        }
    )
    alone.save_pretrained(tmp_path / "alone")
    (tmp_path / "bin").mkdir()
    torch.save(clip.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_bytes((folder / "clip/config.json").read_bytes())
    expected = leaves(folder / "two")
    for kind in ("alone", "bin"):
        write_llava(tmp_path / kind, tmp_path / f"{kind}_base", llm=folder / "qwen2")
        found = leaves(tmp_path / f"{kind}_base")
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_parts_of_any_checkpoint_will_do(parts, tmp_path):
    folder, _, _ = parts
    write_base(tmp_path / "seen", "llama")
    write_llava(tmp_path / "seen", tmp_path / "out", llm=folder / "one", seed=1)
    ours, seen, other = (leaves(p) for p in (tmp_path / "out", tmp_path / "seen", folder / "one"))
    for path, leaf in ours.items():
        if not path.startswith("projector/"):
            source = seen if path.startswith("vision/") else other
            np.testing.assert_array_equal(leaf, source[path])


def test_what_cannot_be_joined_is_refused_and_leaves_nothing(parts, tmp_path):
    folder, _, _ = parts
    out = tmp_path / "out"
    write_language(tmp_path / "t5", "t5")
    with pytest.raises(
        ValueError, match="no language model of LLaVA(.|\n)*is t5; supported: llama"
    ):
        write_llava(folder / "clip", out, llm=tmp_path / "t5")
    with pytest.raises(ValueError, match="shapes_t5 is a language model of kind t5: LLaVA takes"):
        write_llava(folder / "clip", out, llm="shapes_t5")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        write_llava(folder / "nowhere", out, llm=folder / "llama")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "model.safetensors").write_bytes((folder / "clip/model.safetensors").read_bytes())
    config = json.loads((folder / "clip/config.json").read_text())
    config["vision_config"] |= {"hidden_act": "relu", "num_hidden_layers": 1}
    (wrong / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        write_llava(wrong, out, llm=folder / "llama")
    config["vision_config"]["hidden_act"] = "quick_gelu"
    (wrong / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unused_layers 1 is not below layers 1"):
        write_llava(wrong, out, llm=folder / "llama")
    config["vision_config"]["num_hidden_layers"] = 3
    (wrong / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fit its config.json(.|\n)*layers.3"):
        write_llava(wrong, out, llm=folder / "llama")
    assert not out.exists()
