"""Original LLaVA to a checkpoint and back: whole folders, deltas, projectors, and bad ones."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import jax_instructblip
from jax_instructblip import checkpoint
from jax_instructblip.__main__ import main
from jax_instructblip.conversion.llava_export import export_original
from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.conversion.stored_model import read_stored_model
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.data.tokenizer_files import load_tokenizers
from jax_instructblip.inference.loading import read_params, read_source
from tests.conversion.test_export import load_in_transformers
from tests.helpers import hf_folders
from tests.helpers.llava_folders import write_llava
from tests.helpers.llava_originals import (
    STORED,
    original_tensors,
    write_bins,
    write_clip,
    write_llama,
    write_original,
)

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

LLAVA = "LlavaForConditionalGeneration"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROJECTOR = "model.mm_projector."


def convert(source, out, **folders):
    jax_instructblip.convert(source, out, **folders)
    return out


def export(source, out, **settings):
    jax_instructblip.export(source, out, **settings)
    return out


def leaves(path):
    return checkpoint.flatten(read_params(read_source(path), lambda path, array: array))


def assert_same_leaves(found, wanted):
    found, wanted = leaves(found), leaves(wanted)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert found[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(found[path], leaf)


def bin_tensors(folder):
    found = {}
    for path in folder.glob("pytorch_model*.bin"):
        found |= torch.load(path, weights_only=True)
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """Folders `hf`, `clip` and `original` of a LLaVA v1, whose projector is one layer."""
    root = tmp_path_factory.mktemp("linear")
    write_llava(root / "hf", "llama", linear=True)
    write_clip(root / "hf", root / "clip")
    write_original(root / "hf", root / "original")
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same of a v1.5 with Mistral, which has two layers and stores its image tower."""
    root = tmp_path_factory.mktemp("two")
    write_llava(root / "hf", "mistral", linear=False)
    write_clip(root / "hf", root / "clip")
    write_original(root / "hf", root / "original", stored=True, image_aspect_ratio=None)
    return root


@pytest.mark.parametrize("name", ["linear", "two"])
def test_there_and_back_no_bit_changes(request, tmp_path, name):
    root = request.getfixturevalue(name)
    ours = convert(root / "original", tmp_path / "ours", vision=root / "clip")
    assert_same_leaves(ours, root / "hf")
    back = export(ours, tmp_path / "back", format="original", shard_bytes=20_000)
    assert len(list(back.glob("*.safetensors"))) > 1
    assert_same(hf_folders.tensors(back), bin_tensors(root / "original"))
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (root / "original", back)
    )
    assert after == before
    vision = hf_folders.tensors(root / "clip")
    wanted = {n: vision[n] for n in vision if n.startswith("vision_model.")}
    assert_same(hf_folders.tensors(back / "vision_tower"), wanted)
    again = convert(back, tmp_path / "again", vision=back / "vision_tower")
    assert checkpoint.manifest_digest(again) == checkpoint.manifest_digest(ours)
    load_in_transformers(back / "vision_tower", "CLIPVisionModel")


def test_what_the_checkpoint_says_of_its_origin(linear, tmp_path, capsys):
    words = ["convert", str(linear / "original"), "--vision", str(linear / "clip"), "--out"]
    assert main([*words, str(tmp_path / "ours")]) == 0
    assert "left out text_model.*: CLIP's text tower" in capsys.readouterr().out
    stored = checkpoint.read_config(tmp_path / "ours")
    source, llm = stored["source"], stored["variant"]["llm"]
    assert source["kind"] == "llava" and source["image_aspect_ratio"] == "pad"
    assert source["mm_use_im_start_end"] is False
    asked = stored["input_format"]
    assert (asked["template"], asked["image_crop"], asked["image_marks"]) == ("v1", "pad", None)
    assert source["files"].keys() == {f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)}
    assert source["vision_tower"]["files"]["model.safetensors"]["header_sha256"]
    assert (llm["bos_id"], llm["eos_id"]) == (1, 2)
    assert stored["variant"]["vision"]["unused_layers"] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_linear_projector_is_exact_in_transformers(linear, tmp_path, dtype):
    """The second layer that Hugging Face needs is the identity, and is known on the way back."""
    kind = getattr(torch, dtype)
    tensors = {n: leaf.to(kind) for n, leaf in bin_tensors(linear / "original").items()}
    original = shutil.copytree(linear / "original", tmp_path / "original")
    write_bins(original, tensors)
    ours = convert(original, tmp_path / "ours", vision=linear / "clip")
    back = export(ours, tmp_path / "hf")
    theirs = load_in_transformers(back, LLAVA).to(kind).model.multi_modal_projector
    features = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(kind)
    weight, bias = tensors[f"{PROJECTOR}weight"], tensors[f"{PROJECTOR}bias"]
    with torch.no_grad():
        assert torch.equal(theirs(features), torch.nn.functional.linear(features, weight, bias))
    again = convert(back, tmp_path / "again")
    assert read_source(again).variant.bridge.layers == 1
    export(again, tmp_path / "last", format="original")
    assert_same(hf_folders.tensors(tmp_path / "last"), tensors)


def test_a_hugging_face_folder_in_the_original_layout(two, tmp_path, capsys):
    ours = convert(two / "hf", tmp_path / "ours")
    assert main(["export", str(ours), "--format", "original", "--out", str(tmp_path / "out")]) == 0
    note = capsys.readouterr().err
    assert "the image tower is in vision_tower/ of the folder; name that folder" in note
    found = hf_folders.tensors(tmp_path / "out")
    expected = original_tensors(two / "hf")
    assert_same(found, {n: expected[n] for n in expected if not n.startswith(STORED)})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlavaMistralForCausalLM"]
    assert config["mm_projector_type"] == "mlp2x_gelu" and config["mm_hidden_size"] == 24
    again = convert(tmp_path / "out", tmp_path / "again", vision=tmp_path / "out/vision_tower")
    assert_same_leaves(again, ours)
    back = export(again, tmp_path / "back")
    wanted = hf_folders.tensors(
        two / "hf"
    )  # of transformers 5, which has other names than released
    released = {n.replace("vision_tower.", "vision_tower.vision_model."): wanted[n] for n in wanted}
    assert_same(hf_folders.tensors(back), released)


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_a_tokenizer_that_names_no_special_tokens(linear, tmp_path, layout):
    folder = shutil.copytree(linear / layout, tmp_path / "bare")
    (folder / "tokenizer_config.json").unlink()
    ours = convert(
        folder, tmp_path / "ours", **({} if layout == "hf" else {"vision": linear / "clip"})
    )
    variant = read_source(ours).variant
    assert (variant.llm.bos_id, variant.llm.eos_id, variant.llm.pad_id) == (1, 2, 0)
    for source in [ours] + [folder] * (layout == "hf"):
        tokenizer = TextProcessor.load(source, variant).llm
        assert (tokenizer.bos_token, tokenizer.pad_token) == ("<s>", "<unk>")


def test_sizes_of_now_are_written(linear, tmp_path):
    """Tuning can change sizes: a tower of larger images is not that of the source any more."""
    ours = convert(linear / "original", tmp_path / "ours", vision=linear / "clip")
    model = read_stored_model(ours)
    source = model.facts["original_config"] | {"mm_vision_tower": "openai/clip-vit-large-patch14"}
    changed = dataclasses.replace(
        model,
        variant=model.variant.replace(**{"llm.max_positions": 99, "vision.image_size": 56}),
        facts={**model.facts, "original_config": source},
    )
    (note,) = export_original(changed, tmp_path / "out")
    assert "name that folder as mm_vision_tower" in note
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == source | {"max_position_embeddings": 99, "mm_vision_tower": None}
    tower = json.loads((tmp_path / "out" / "vision_tower" / "config.json").read_text())
    images = json.loads((tmp_path / "out/vision_tower/preprocessor_config.json").read_text())
    assert tower["image_size"] == images["crop_size"]["height"] == 56


def as_half(tensors):
    return {name: leaf.to(torch.float16) for name, leaf in tensors.items()}


@pytest.fixture(scope="module")
def delta(linear):
    """A base of fewer rows, and the difference to it, in half precision as released."""
    whole = as_half(bin_tensors(linear / "original"))
    rows = len(whole[EMBED]) - 4
    generator = torch.Generator().manual_seed(3)
    base = {}
    for name, leaf in whole.items():
        if not name.startswith(PROJECTOR):
            leaf = leaf[:rows] if name in (EMBED, HEAD) else leaf
            noise = 0.01 * torch.randn(leaf.shape, generator=generator)
            base[name] = (leaf + noise).to(torch.float16)
    write_llama(linear / "hf", linear / "base", base)
    difference = dict(whole)
    for name, leaf in base.items():
        both = whole[name].clone()
        both[: len(leaf)] -= leaf
        difference[name] = both
    shutil.copytree(linear / "original", linear / "delta")
    write_bins(linear / "delta", difference)
    return difference, base


def test_a_delta_is_added_as_the_original_code_adds_it(linear, delta, tmp_path, caplog):
    difference, base = delta
    given = {"vision": linear / "clip", "base": linear / "base"}
    ours = convert(linear / "delta", tmp_path / "ours", **given)
    back = export(ours, tmp_path / "back", format="original")
    expected = {name: leaf.clone() for name, leaf in difference.items()}
    for name, leaf in base.items():
        expected[name][: len(leaf)] += leaf  # in half precision
    assert_same(hf_folders.tensors(back), expected)
    rows = slice(len(base[EMBED]), None)
    assert torch.equal(expected[EMBED][rows], difference[EMBED][rows])  # absolute
    base = checkpoint.read_config(ours)["source"]["base"]
    assert base["files"].keys() == {"pytorch_model-00001-of-00001.bin"}
    assert base["rounded_sums"] < 0.06 and not caplog.records


def test_a_base_that_the_delta_was_not_made_with_is_named(linear, delta, tmp_path, caplog):
    _, base = delta
    generator = torch.Generator().manual_seed(4)
    other = {}
    for name, leaf in base.items():
        drawn = torch.randn(leaf.shape, generator=generator) * leaf.float().std(correction=0)
        other[name] = (leaf.float().mean() + drawn).to(torch.float16)
    write_llama(linear / "hf", tmp_path / "other", other)
    given = {"vision": linear / "clip", "base": tmp_path / "other"}
    ours = convert(linear / "delta", tmp_path / "ours", **given)
    assert checkpoint.read_config(ours)["source"]["base"]["rounded_sums"] > 0.2
    (record,) = caplog.records
    assert "is this the LLaMA that the delta was made with?" in record.getMessage()


def test_a_delta_and_its_base_belong_together(linear, delta, tmp_path):
    out, vision = tmp_path / "out", linear / "clip"
    with pytest.raises(ConversionError, match=r"holds a delta(.|\n)*--base"):
        convert(linear / "delta", out, vision=vision)
    with pytest.raises(ConversionError, match=r"the folder holds no delta"):
        convert(linear / "original", out, vision=vision, base=linear / "base")
    _, base = delta
    cut = {n: leaf[:, :-2] if n == EMBED else leaf for n, leaf in base.items()}
    cut["model.layers.7.extra"] = torch.ones(2)
    cut.pop("model.norm.weight")
    write_llama(linear / "hf", tmp_path / "other", cut)
    with pytest.raises(ConversionError, match="is not the base of") as caught:
        convert(linear / "delta", out, vision=vision, base=tmp_path / "other")
    text = "\n".join(caught.value.failures)
    assert "embed_tokens.weight: the delta has the shape [" in text
    assert "model.layers.7.extra: the delta has no such tensor" in text
    assert "model.norm.weight: the base has no such tensor" in text
    assert not out.exists()


@pytest.fixture(scope="module")
def llm(linear):
    """The folder of the language model alone, whose tokenizer has a token for each row."""
    tensors = bin_tensors(linear / "original")
    tokenizer, _ = load_tokenizers(linear / "hf", None, "llama")
    rows = len(tokenizer.get_vocab())
    own = {n: leaf for n, leaf in tensors.items() if not n.startswith(PROJECTOR)}
    own = {n: leaf[:rows] if n in (EMBED, HEAD) else leaf for n, leaf in own.items()}
    write_llama(linear / "hf", linear / "llm", own)
    return own


def write_projector(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "mm_projector.bin")
    if config:
        document = {"mm_vision_tower": "somebody/clip", "mm_hidden_size": 24} | config
        (folder / "config.json").write_text(json.dumps(document))
    return folder


def projector_of(linear):
    tensors = bin_tensors(linear / "original")
    return {name: leaf for name, leaf in tensors.items() if name.startswith(PROJECTOR)}


def test_a_projector_alone_there_and_back(linear, llm, tmp_path):
    tensors = projector_of(linear)
    folder = write_projector(tmp_path / "in", tensors, image_aspect_ratio="pad")
    given = {"vision": linear / "clip", "llm": linear / "llm"}
    ours = convert(folder / "mm_projector.bin", tmp_path / "ours", **given)
    assert checkpoint.read_config(ours)["source"]["image_aspect_ratio"] == "pad"
    back = export(ours, tmp_path / "back", format="projector")
    assert sorted(path.name for path in back.iterdir()) == ["config.json", "mm_projector.bin"]
    assert_same(torch.load(back / "mm_projector.bin"), tensors)
    again = convert(back, tmp_path / "again", **given)
    assert_same_leaves(again, ours)
    whole = export(ours, tmp_path / "whole", format="original")
    assert_same(hf_folders.tensors(whole), llm | tensors)
    config = json.loads((whole / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]


def test_marks_that_the_tokenizer_lacks_are_told_with_their_files(linear, tmp_path):
    write_original(linear / "hf", tmp_path / "in", mm_use_im_start_end=True)
    message = "mm_use_im_start_end is True, but .*in has no <im_start> and <im_end>: .*added_tokens"
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "in", tmp_path / "ours", vision=linear / "clip")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("whole", [True, False], ids=["table", "two rows"])
def test_rows_of_the_marks_around_an_image(linear, llm, tmp_path, whole):
    rows, width = llm[EMBED].shape
    marks = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    table = torch.cat([llm[EMBED], torch.zeros(1, width), marks])  # <im_patch> before them
    tensors = projector_of(linear) | {EMBED: table if whole else marks}
    folder = write_projector(tmp_path / "in", tensors, mm_use_im_start_end=True)
    given = {"vision": linear / "clip", "llm": linear / "llm"}
    ours = convert(folder, tmp_path / "ours", **given)
    found = leaves(ours)
    np.testing.assert_array_equal(found["llm/embed/embedding"][-2:], marks.numpy())
    head = found["llm/head/kernel"]
    assert head.shape[1] == rows + 3
    np.testing.assert_allclose(head[:, -1], llm[HEAD].mean(0).numpy(), rtol=1e-5, atol=1e-6)
    text = TextProcessor.load(ours, read_source(ours).variant)
    assert text.llm.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"]) == [
        rows,
        rows + 1,
        rows + 2,
    ]
    asked = checkpoint.read_config(ours)["input_format"]
    assert asked["image_marks"] == ["<im_start>", "<im_end>"] and asked["image_crop"] == "clip"
    back = export(ours, tmp_path / "back", format="projector")
    stored = torch.load(back / "mm_projector.bin")
    assert torch.equal(stored[EMBED][-2:], marks) and len(stored[EMBED]) == rows + 3
    assert not whole or torch.equal(stored[EMBED], table)
    assert json.loads((back / "config.json").read_text())["mm_use_im_start_end"] is True
