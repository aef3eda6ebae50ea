"""`backbones stage2` and `instruct`: which weights the bases have, and errors for wrong parts."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import jax_instructblip
from jax_instructblip import checkpoint, remote
from jax_instructblip.__main__ import main
from jax_instructblip.backbones.stage1 import write_stage1
from jax_instructblip.backbones.stage2 import write_instruct, write_stage2
from jax_instructblip.checkpoint import read_config
from jax_instructblip.conversion.language_folder import open_language
from jax_instructblip.inference.loading import read_params, read_source
from tests.helpers.language_folders import write_language
from tests.helpers.tiny import write_base

pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

KINDS = ("t5", "opt", "llama")
PHOTO = Image.new("RGB", (40, 30), (200, 30, 30))


def leaves(path):
    return checkpoint.flatten(read_params(read_source(path), lambda path, array: array))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A first stage, a language model of each kind, and the second stage of both."""
    folder = tmp_path_factory.mktemp("chain")
    write_base(folder / "other", "t5")
    write_stage1(folder / "other", folder / "stage1", features=12, seed=3)
    models = {}
    for kind in KINDS:
        models[kind] = write_language(folder / kind, kind)
        write_stage2(folder / "stage1", folder / f"stage2_{kind}", llm=folder / kind)
    return folder, models


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_stage_is_of_a_first_one_and_a_language_model(chain, kind):
    folder, models = chain
    ours, first = leaves(folder / f"stage2_{kind}"), leaves(folder / "stage1")
    theirs = {name: leaf.numpy() for name, leaf in models[kind].state_dict().items()}
    own = [path for path in ours if not path.startswith(("llm/", "qformer/projection/"))]
    assert len(own) > 30 and not any("text_" in path for path in own)
    for path in own:
        np.testing.assert_array_equal(ours[path], first[path])
    assert ours["qformer/projection/kernel"].std() > 0.1
    assert not ours["qformer/projection/bias"].any()
    embed = {"t5": "shared", "opt": "model.decoder.embed_tokens", "llama": "model.embed_tokens"}
    table = theirs[f"{embed[kind]}.weight"]
    np.testing.assert_array_equal(ours["llm/embed/embedding"][: len(table)], table)
    if kind == "llama":
        (row,) = ours["llm/embed/embedding"][len(table) :]
        np.testing.assert_allclose(row, table.mean(axis=0), atol=1e-6)
        head = theirs["lm_head.weight"]
        np.testing.assert_allclose(ours["llm/head/kernel"][:, -1], head.mean(axis=0), atol=1e-6)
    else:
        assert len(ours["llm/embed/embedding"]) == len(table)


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_special_tokens_of_the_release_and_answers(chain, kind):
    folder, _ = chain
    blip = jax_instructblip.load(folder / f"stage2_{kind}")
    llm, tokenizer = blip.variant.llm, blip.text.llm
    assert blip.variant.kind == "blip2" and blip.text.qformer is None
    if kind == "llama":
        ids = tokenizer.convert_tokens_to_ids(["</s>", "[PAD]"])
        assert [llm.bos_id, llm.pad_id] == ids and llm.eos_id == llm.bos_id == 2
        assert llm.pad_id == llm.vocab - 1
    if kind == "opt":
        assert tokenizer.convert_ids_to_tokens(llm.eos_id) == "Ċ"
    if kind == "t5":
        assert llm.activation == "gelu"  # stock FlanT5 has the tanh form
    (answer,) = blip.generate([PHOTO], ["a photo of"], max_new_tokens=3)
    assert 1 <= len(answer.tokens) <= 3


def test_instruction_tuning_gets_the_text_half_of_the_first_stage(chain, capsys):
    folder, _ = chain
    words = ["backbones", "instruct", str(folder / "stage2_llama"), str(folder / "instruct")]
    assert main([*words, "--text_from", str(folder / "stage1")]) == 0
    printed = capsys.readouterr().out
    assert f"text half of the Q-Former: {folder / 'stage1'}" in printed
    ours, first = leaves(folder / "instruct"), leaves(folder / "stage1")
    second = leaves(folder / "stage2_llama")
    text = ours.keys() - second.keys()
    assert {path.split("/")[1] for path in text} == {"text_embed", "position_embed", "layers"}
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, first[path] if path in text else second[path])
    blip = jax_instructblip.load(folder / "instruct")
    assert blip.variant.kind == "instructblip" and blip.variant.reads_instruction
    assert blip.text.qformer.bos_token == "[DEC]"
    # The Q-Former reads the question: other visual vectors of the same image.
    one, other = blip.features([PHOTO] * 2, ["what color is it?", "which image is this?"])
    assert np.abs(one - other).max() > 1e-4
    origins = read_config(folder / "instruct")["source"]
    assert origins["text half of the Q-Former"] == str(folder / "stage1")


def test_the_language_model_of_any_checkpoint_will_do(chain, tmp_path, capsys):
    folder, _ = chain
    words = ["backbones", "stage2", str(folder / "stage1"), str(tmp_path / "out"), "--llm"]
    assert main([*words, "shapes_t5"]) == 0 and "shapes_t5" in capsys.readouterr().out
    ours, theirs = leaves(tmp_path / "out"), leaves("shapes_t5")
    for path in (path for path in theirs if path.startswith("llm/")):
        np.testing.assert_array_equal(ours[path], theirs[path])


def test_what_cannot_be_joined_is_refused_and_leaves_nothing(chain, tmp_path):
    folder, _ = chain
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="stage2_t5 is a model of kind blip2: expected"):
        write_stage2(folder / "stage2_t5", out, llm=folder / "t5")
    with pytest.raises(ValueError, match="kind blip2_stage1, which has no language"):
        write_stage2(folder / "stage1", out, llm=folder / "stage1")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        write_stage2(folder / "stage1", out, llm=folder / "nowhere")
    with pytest.raises(ValueError, match="kind blip2_stage1: expected one of kind blip2"):
        write_instruct(folder / "stage1", out, text_from=folder / "stage1")
    with pytest.raises(ValueError, match="kind blip2: expected one of kind blip2_stage1"):
        write_instruct(folder / "stage2_t5", out, text_from=folder / "stage2_t5")
    write_base(folder / "wide", "t5", **{"qformer.mlp": 32})
    write_stage1(folder / "wide", folder / "stage1_wide", features=12)
    with pytest.raises(ValueError, match=r"do not fit together: qformer\.mlp: 28 and 32"):
        write_instruct(folder / "stage2_t5", out, text_from=folder / "stage1_wide")
    assert not out.exists()
    with pytest.raises(FileExistsError):
        write_stage2(folder / "stage1", folder / "stage2_t5", llm=folder / "t5")


def test_what_is_told_and_written_of_an_address_is_the_address(chain, capsys):
    folder, _ = chain
    remote.put(folder / "stage1", "memory://joined/stage1", last="config.json")
    remote.put(folder / "t5", "memory://joined/t5", last="config.json")
    out = write_stage2("memory://joined/stage1", folder / "far", llm="memory://joined/t5")
    assert read_config(Path(out))["source"]["Q-Former"] == "memory://joined/stage1"
    assert read_config(Path(out))["source"]["language model"] == "memory://joined/t5"
    assert "memory://joined/t5: activation" in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_told(chain, tmp_path, capsys):
    folder, models = chain
    shutil.copytree(folder / "opt", tmp_path / "opt")
    state = models["opt"].state_dict()
    name = "model.decoder.final_layer_norm.weight"
    tensors = {name: state[name] * float("nan")}
    tensors = {
        each: tensors.get(each, state[each]).clone() for each in state if "lm_head" not in each
    }
    save_file(tensors, tmp_path / "opt" / "model.safetensors")
    write_stage2(folder / "stage1", tmp_path / "out", llm=tmp_path / "opt")
    assert "NaN or infinity in llm/norm/scale of " in capsys.readouterr().err


def test_a_damaged_language_model_leaves_nothing(chain, tmp_path):
    folder, _ = chain
    write_language(tmp_path / "t5", "t5", d_ff=32)
    config = (folder / "t5" / "config.json").read_bytes()
    (tmp_path / "t5" / "config.json").write_bytes(config)
    with pytest.raises(ValueError, match=r"do not fit its config\.json(.|\n)*wi_0"):
        write_stage2(folder / "stage1", tmp_path / "out", llm=tmp_path / "t5")
    assert not (tmp_path / "out").exists()


def test_sizes_of_the_language_model_are_those_of_its_folder(chain):
    folder, _ = chain
    found = open_language(folder / "llama").config
    stored = read_source(folder / "stage2_llama").variant.llm
    assert found == stored and dataclasses.asdict(found)["layers"] == 2


@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_a_newer_language_model_keeps_its_special_tokens_and_answers(chain, tmp_path, kind):
    folder, _ = chain
    model = write_language(tmp_path / kind, kind)
    write_stage2(folder / "stage1", tmp_path / "out", llm=tmp_path / kind)
    blip = jax_instructblip.load(tmp_path / "out")
    llm, names = blip.variant.llm, blip.text.llm.convert_ids_to_tokens
    assert llm.vocab == model.config.vocab_size and llm.tied_head == (kind == "qwen2")
    pad = "<|end_of_text|>" if kind == "llama3" else "<|endoftext|>"
    starts = "<|begin_of_text|>" if kind == "llama3" else "<|endoftext|>"
    ends = "<|end_of_text|>" if kind == "llama3" else "<|im_end|>"
    assert names([llm.bos_id, llm.eos_id, llm.pad_id]) == [starts, ends, pad]
    example = blip.text.example("what color is it?", "red")
    assert blip.text.decode(example["tokens"]) == "what color is it? red"
    (answer,) = blip.generate([PHOTO], ["a photo of"], max_new_tokens=3)
    assert 1 <= len(answer.tokens) <= 3
