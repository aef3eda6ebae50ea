"""Folders of a language model alone: tensor names, files and configs as releases have them."""

import json

import numpy as np
import pytest

from jax_instructblip.conversion.language_folder import is_language_folder, open_language
from jax_instructblip.conversion.safetensors import ConversionError
from tests.helpers.language_folders import write_language

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")


def to_bin(folder, tensors, shards=1):
    """Saves the weights as PyTorch does, and takes the safetensors away."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        own = names[number::shards]
        torch.save({each: tensors[each] for each in own}, folder / name)
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
def test_files_of_pytorch_hold_the_same_leaves(tmp_path, kind, shards):
    model = write_language(tmp_path, kind)
    expected = dict(open_language(tmp_path))
    to_bin(tmp_path, model.state_dict(), shards)
    found = dict(open_language(tmp_path))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)


def test_a_model_saved_without_its_head(tmp_path):
    """OPT's head is its embedding: a folder of `OPTModel` is the whole model."""
    model = write_language(tmp_path, "opt")
    expected = dict(open_language(tmp_path))
    state = model.model.state_dict()
    assert all(name.startswith("decoder.") for name in state)
    to_bin(tmp_path, state)
    for path, leaf in open_language(tmp_path):
        np.testing.assert_array_equal(leaf, expected[path])


def test_a_shard_that_is_lacking(tmp_path):
    model = write_language(tmp_path, "t5")
    to_bin(tmp_path, model.state_dict(), 2)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ConversionError, match="lacks files of its index"):
        open_language(tmp_path)


def test_other_folders_are_refused(tmp_path):
    write_language(tmp_path / "t5", "t5")
    assert is_language_folder(tmp_path / "t5") and not is_language_folder(tmp_path)
    config = tmp_path / "t5" / "config.json"
    document = json.loads(config.read_text())
    config.write_text(json.dumps(document | {"model_type": "gpt2"}))
    assert is_language_folder(tmp_path / "t5")  # though an unknown one
    with pytest.raises(ConversionError, match="no language model that is known(.|\n)*'gpt2'"):
        open_language(tmp_path / "t5")
    config.write_text(json.dumps(document | {"feed_forward_proj": "relu"}))
    with pytest.raises(ConversionError, match="cannot be held(.|\n)*gated"):
        open_language(tmp_path / "t5")
    config.write_text(json.dumps(document))
    (tmp_path / "t5" / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="holds no weights"):
        open_language(tmp_path / "t5")


def test_a_tokenizer_that_is_missing(tmp_path):
    write_language(tmp_path, "opt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer is missing"):
        open_language(tmp_path)


def test_files_that_two_models_left_are_not_mixed(tmp_path):
    """An index names its files; without one, files must agree about a tensor that both have."""
    model = write_language(tmp_path, "llama")
    state = model.state_dict()
    to_bin(tmp_path, state, 2)
    torch.save({name: leaf * 0 for name, leaf in state.items()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"two models(.|\n)*pytorch_model\.bin"):
        open_language(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(ConversionError, match="no readable weight_map"):
        open_language(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": ["x"]}}))
    with pytest.raises(ConversionError, match="tensors have no file name"):
        open_language(tmp_path)
    index.unlink()
    with pytest.raises(ConversionError, match="different values for the same tensors"):
        open_language(tmp_path)


def test_a_head_beside_names_without_their_first_word(tmp_path):
    model = write_language(tmp_path, "llama")
    expected = dict(open_language(tmp_path))
    to_bin(tmp_path, {n.removeprefix("model."): leaf for n, leaf in model.state_dict().items()})
    for path, leaf in open_language(tmp_path):
        np.testing.assert_array_equal(leaf, expected[path])


def test_configurations_that_are_refused(tmp_path):
    model = write_language(tmp_path, "llama")
    config = tmp_path / "config.json"
    document = json.loads(config.read_text())
    for changes, message in (
        ({"model_type": ["llama"]}, "no language model that is known"),
        ({"model_type": None}, r"model_type is None; supported: llama"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ):
        config.write_text(json.dumps(document | changes))
        assert is_language_folder(tmp_path)
        with pytest.raises(ConversionError, match=message):
            open_language(tmp_path)
    state = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:100]
    to_bin(tmp_path, state)
    config.write_text(json.dumps(document | {"vocab_size": 100}))
    with pytest.raises(ConversionError, match=r"is of another model(.|\n)*vocab_size of 100"):
        open_language(tmp_path)
    config.write_text(json.dumps({"model_type": "llava", "vision_config": {}}))
    assert not is_language_folder(tmp_path)
