import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.conversion import hf_folder
from jax_instructblip.conversion.families import FAMILIES
from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.conversion.stored_model import copy_tokenizers
from jax_instructblip.models.released import get_variant, released_name
from jax_instructblip.models.vlm import param_shapes
from tests.helpers.hf_folders import INDEX, copy, edit_config, tensors

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

FLAN, VICUNA = "instructblip-flan-t5-xl", "instructblip-vicuna-7b"
T5_HEAD, SHARED = "language_model.lm_head.weight", "language_model.shared.weight"
VISION_LAYER = "vision_model.encoder.layers."


def failures(folder, **kwargs):
    with pytest.raises(ConversionError) as error:
        hf_folder.convert_hf(folder, **kwargs)
    return error.value.failures


def float32(tensor):
    return tensor.to(torch.float32).numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [FLAN, VICUNA])
def test_every_leaf_has_the_shape_of_the_network_and_the_dtype_of_the_source(small, name, dtype):
    variant, params = hf_folder.read_hf(small(name, dtype))
    expected = checkpoint.flatten(param_shapes(variant))
    found = checkpoint.flatten(params)
    assert found.keys() == expected.keys()
    assert {path: leaf.shape for path, leaf in found.items()} == {
        path: leaf.shape for path, leaf in expected.items()
    }
    assert {leaf.dtype.name for leaf in found.values()} == {dtype}


def test_leaves_hold_the_numbers_they_should(flan):
    variant, params = hf_folder.read_hf(flan)
    state = tensors(flan)
    vision, qformer, llm = params["vision"], params["qformer"], params["llm"]
    width, heads = variant.vision.width, variant.vision.heads
    for i in range(variant.vision.layers):
        fused = float32(state[f"{VISION_LAYER}{i}.self_attn.qkv.weight"])
        bias = float32(state[f"{VISION_LAYER}{i}.self_attn.qkv.bias"])
        for part, name in enumerate(("query", "key", "value")):
            rows = fused[part * width : (part + 1) * width].reshape(heads, -1, width)
            kernel = vision["layers"]["attention"][name]["kernel"][i]
            np.testing.assert_array_equal(kernel, rows.transpose(2, 0, 1))
        for part, name in ((0, "query"), (2, "value")):
            rows = bias[part * width : (part + 1) * width].reshape(heads, -1)
            np.testing.assert_array_equal(vision["layers"]["attention"][name]["bias"][i], rows)
    for stack, first in (("cross", 0), ("plain", 1)):
        for pair in range(variant.qformer.layers // 2):
            prefix = f"qformer.encoder.layer.{2 * pair + first}."
            layer = jax.tree.map(lambda x, pair=pair: x[pair], qformer["layers"][stack])
            for theirs, ours in (
                ("intermediate.dense", layer["text_mlp"]["in"]),
                ("intermediate_query.dense", layer["query_mlp"]["in"]),
                ("output.dense", layer["text_mlp"]["out"]),
                ("output_query.dense", layer["query_mlp"]["out"]),
            ):
                np.testing.assert_array_equal(ours["kernel"], state[f"{prefix}{theirs}.weight"].T)
                np.testing.assert_array_equal(ours["bias"], state[f"{prefix}{theirs}.bias"])
    assert "cross_attention" not in qformer["layers"]["plain"]
    np.testing.assert_array_equal(
        qformer["image_norm"]["scale"], state["vision_model.post_layernorm.weight"]
    )
    np.testing.assert_array_equal(llm["head"]["kernel"], state[T5_HEAD].T)
    block = "language_model.decoder.block.1.layer."
    decoder = jax.tree.map(lambda x: x[1], llm["decoder"]["layers"])
    for theirs, ours in (
        ("2.DenseReluDense.wi_0", decoder["mlp"]["gate"]["kernel"]),
        ("2.DenseReluDense.wi_1", decoder["mlp"]["in"]["kernel"]),
        ("2.DenseReluDense.wo", decoder["mlp"]["out"]["kernel"]),
    ):
        np.testing.assert_array_equal(ours, state[f"{block}{theirs}.weight"].T)
    out = state[f"{block}1.EncDecAttention.o.weight"].T.reshape(variant.llm.heads, -1, 64)
    np.testing.assert_array_equal(decoder["cross_attention"]["out"]["kernel"], out)


@pytest.mark.parametrize("name", [FLAN, VICUNA])
def test_shards_make_the_same_leaves(small, tmp_path, name):
    folder = small(name, "bfloat16")
    sharded = copy(folder, tmp_path / "sharded", shards=3)
    assert len(list(sharded.glob("*.safetensors"))) == 3
    one, many = hf_folder.convert_hf(folder), hf_folder.convert_hf(sharded)
    assert one.variant == many.variant
    assert list(one.source["files"]) == ["model.safetensors"]
    assert len(many.source["files"]) == 3
    for (path, a), (other, b) in zip(one.leaves, many.leaves, strict=True):
        assert path == other
        np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))


def test_place_takes_each_leaf_as_it_comes(flan):
    seen = []

    def place(path, array):
        seen.append(path)
        return array.astype(np.float16)

    variant, params = hf_folder.read_hf(flan, place=place)
    assert sorted(seen) == sorted(checkpoint.flatten(param_shapes(variant)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float16")}


def test_sizes_and_ids_are_those_of_the_folder(forge):
    for name, wanted in ((FLAN, "tiny-t5"), (VICUNA, "tiny-vicuna")):
        folder = forge(name)
        variant, source, *_ = hf_folder.convert_hf(folder, wanted)
        expected = get_variant(wanted).replace(**{"qformer.image_norm_eps": 1e-6})
        if wanted == "tiny-vicuna":
            expected = expected.replace(**{"llm.vocab": 32003})
        assert variant == expected
        assert released_name(variant) == wanted
        assert source["config"] == json.loads((folder / "config.json").read_text())
        assert str(folder) not in json.dumps(source)


def test_wrong_variant_for_the_folder(flan):
    with pytest.raises(ConversionError, match="is not instructblip-vicuna-7b; it fits tiny-t5"):
        hf_folder.convert_hf(flan, VICUNA)
    lines = failures(flan, variant=VICUNA)
    assert "llm.kind: expected llama, found t5" in lines
    assert "vision.layers: expected 39, found 4" in lines
    lines = failures(flan, variant="tiny-vicuna")
    assert "llm.kind: expected llama, found t5" in lines
    assert not any(line.startswith(("vision", "qformer")) for line in lines)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"architectures": ["BlipForQuestionAnswering"]}, "BlipForQuestionAnswering"),
        ({"architectures": [], "model_type": "gpt2"}, "gpt2"),
        ({"architectures": None}, "None"),
    ],
)
def test_another_architecture_names_what_is_supported(tmp_path, config, found):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (line,) = failures(tmp_path)
    supported = ", ".join(family.architecture for family in FAMILIES)
    assert line == f"found {found}; supported: {supported}"


def test_folder_without_config(tmp_path):
    with pytest.raises(ConversionError, match="config.json cannot be read"):
        hf_folder.convert_hf(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_reported_together(flan, tmp_path):
    def damage(state):
        del state["query_tokens"]
        del state[VISION_LAYER + "2.mlp.fc1.weight"]
        state[VISION_LAYER + "4.mlp.fc1.weight"] = torch.zeros(384, 88)
        state["stray"] = torch.zeros(3)
        state["language_projection.weight"] = torch.zeros(48, 64)

    folder = copy(flan, tmp_path / "damaged", change=damage)
    assert failures(folder) == [
        "language_projection.weight: for qformer/projection/kernel: "
        "expected shape [64, 48], found [48, 64]",
        "query_tokens: missing: qformer/queries needs it, shape [1, 8, 48]",
        "stray: unexpected: no rule uses it, shape [3]",
        "vision_model.encoder.layers.2.mlp.fc1.weight: missing: "
        "vision/layers/mlp/in/kernel needs it, shape [384, 88]",
        "vision_model.encoder.layers.4.mlp.fc1.weight: unexpected: no rule uses it, "
        "shape [384, 88]",
    ]


def test_config_that_disagrees_with_the_tensors(vicuna, tmp_path):
    def lie(config):
        config["text_config"]["vocab_size"] = 301
        config["vision_config"]["num_hidden_layers"] = 5

    lines = failures(copy(vicuna, tmp_path / "lying", config=lie))
    assert any("lm_head.weight" in x and "[301, 64], found [300, 64]" in x for x in lines)
    assert any("embed_tokens.weight" in x and "[301, 64], found [300, 64]" in x for x in lines)
    assert any(VISION_LAYER + "4.mlp.fc1.weight: missing" in x for x in lines)


def test_sizes_beyond_the_tensors_are_told_before_anything_is_built(flan, vicuna, tmp_path):
    def lie(config):
        config["vision_config"].update(num_hidden_layers=2_000_000_000)
        config["qformer_config"].update(hidden_size=2_000_000_004, vocab_size=2_000_000_000)
        config["text_config"].update(num_decoder_layers=2_000_000_000, d_model=301)
        config["num_query_tokens"] = 2_000_000_000

    assert failures(copy(flan, tmp_path / "flan", config=lie)) == [
        "num_query_tokens is 2000000000, but the longest axis of all tensors is 512",
        "vision_config.num_hidden_layers is 2000000000, but the folder has 230 tensors in all",
        "qformer_config.vocab_size is 2000000000, but the longest axis of all tensors is 512",
        "qformer_config.hidden_size is 2000000004, but the longest axis of all tensors is 512",
        "text_config.num_decoder_layers is 2000000000, but the folder has 230 tensors in all",
    ]

    def pixels(config):
        config["vision_config"].update(image_size=14 * 100_000)

    (line,) = failures(copy(vicuna, tmp_path / "vicuna", config=pixels))
    assert line == (
        "vision_config.image_size is 1400000, but the longest axis of all tensors is 512 (patches "
        "and CLS: 10000000001)"
    )


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.model."])
def test_a_prefix_of_all_names_is_told_once_with_the_cure(flan, tmp_path, prefix):
    def wrap(state):
        for key in list(state):
            state[prefix + key] = state.pop(key)

    (line,) = failures(copy(flan, tmp_path / "wrapped", change=wrap))
    assert line.startswith(f"all 230 begin with {prefix!r}")
    assert f"key.removeprefix({prefix!r})" in line


def test_key_bias_that_is_not_zero_is_refused_by_name(flan, tmp_path):
    def train(state):
        state[VISION_LAYER + "1.self_attn.qkv.bias"][88 + 5] = 1e-6

    (line,) = failures(copy(flan, tmp_path / "trained", change=train))
    assert line.startswith(VISION_LAYER + "1.self_attn.qkv.bias: elements 88 to 175 must be zero")
    assert "1e-06" in line and "without a key bias" in line


def test_damaged_shards(flan, tmp_path):
    folder = copy(flan, tmp_path / "sharded", shards=3)
    victim = folder / "model-00002-of-00003.safetensors"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    (line,) = failures(folder)
    assert line.startswith("model-00002-of-00003.safetensors") and line.endswith("truncated")
    victim.unlink()
    (line,) = failures(folder)
    assert "the index names this shard, but there is no such file" in line
    victim.write_bytes(whole)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {
        key: name for key, name in index["weight_map"].items() if name != victim.name
    }
    (folder / INDEX).write_text(json.dumps(index))
    (line,) = failures(folder)
    assert line == f"{victim.name}: the index does not name this file"


def test_stray_buffers_and_aliases_are_dropped_for_a_reason(flan, vicuna, tmp_path):
    def add(state):
        state["qformer.embeddings.position_ids"] = torch.arange(512)[None]
        block = "language_model.decoder.block.0.layer.1.EncDecAttention."
        state[block + "relative_attention_bias.weight"] = torch.ones(32, 4)
        for stack in ("encoder", "decoder"):
            state[f"language_model.{stack}.embed_tokens.weight"] = state[SHARED].clone()

    _, source, *_ = hf_folder.convert_hf(copy(flan, tmp_path / "flan", change=add))
    assert len(source["dropped"]) == 4
    assert (
        "shared.weight by another name"
        in source["dropped"]["language_model.encoder.embed_tokens.weight"]
    )

    def add_rotary(state):
        for i in range(3):
            key = f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq"
            state[key] = torch.ones(8)

    _, source, *_ = hf_folder.convert_hf(copy(vicuna, tmp_path / "vicuna", change=add_rotary))
    assert len(source["dropped"]) == 3

    def differ(state):
        state["language_model.encoder.embed_tokens.weight"] = state[SHARED] + 1

    (line,) = failures(copy(flan, tmp_path / "differs", change=differ))
    assert line.startswith("language_model.encoder.embed_tokens.weight: differs from " + SHARED)


def test_absent_head_is_filled_from_a_tied_embedding_only(flan, tmp_path):
    def tie(state):
        del state[T5_HEAD]

    folder = copy(flan, tmp_path / "tied", change=tie)
    variant, source, leaves, _ = hf_folder.convert_hf(folder)
    assert source["tied_head"]
    made = dict(leaves)
    np.testing.assert_array_equal(made["llm/head/kernel"], made["llm/embed/embedding"].T)
    edit_config(folder, lambda config: config["text_config"].update(tie_word_embeddings=False))
    (line,) = failures(folder)
    assert line.startswith(T5_HEAD + ": missing: llm/head/kernel needs it")


def test_head_that_is_there_is_taken_although_the_config_says_tied(flan):
    assert json.loads((flan / "config.json").read_text())["text_config"]["tie_word_embeddings"]
    _, source, *_ = hf_folder.convert_hf(flan)
    assert not source["tied_head"]


def test_tokenizers_are_copied(forge, tmp_path):
    vicuna = forge(VICUNA)
    assert copy_tokenizers(vicuna, tmp_path, get_variant("tiny-vicuna")) == []
    assert (tmp_path / "tokenizer" / "tokenizer.model").is_file()
    assert (tmp_path / "qformer_tokenizer" / "tokenizer.json").is_file()
    assert not (tmp_path / "tokenizer" / "config.json").exists()
    assert copy_tokenizers(tmp_path / "nowhere", tmp_path, get_variant("tiny-t5")) == [
        "tokenizer",
        "qformer_tokenizer",
    ]


def test_conversion_imports_neither_torch_nor_transformers():
    code = (
        "import sys, jax_instructblip.conversion.hf_folder, jax_instructblip.conversion.export\n"
        "sys.exit(bool({'torch', 'transformers', 'safetensors', 'tensorflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_folder_with_other_pixels_is_refused(flan, tmp_path):
    folder = copy(flan, tmp_path / "other")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_std": [0.5, 0.5, 0.5]}))
    (line,) = failures(folder)
    assert line.startswith("preprocessor_config.json: image_std is [0.5, 0.5, 0.5]; supported")
