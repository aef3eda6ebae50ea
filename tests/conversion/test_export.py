import json
import warnings

import ml_dtypes
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.conversion import hf_folder
from jax_instructblip.conversion.export import export_hf
from jax_instructblip.conversion.stored_model import copy_tokenizers, read_stored_model
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.vlm import param_shapes
from tests.helpers.hf_folders import bits, copy, edit_config, tensors

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

FLAN, VICUNA = "instructblip-flan-t5-xl", "instructblip-vicuna-7b"


def convert(folder, out):
    variant, source, leaves, _ = hf_folder.convert_hf(folder)

    def extra(temporary):
        checkpoint.write_config(temporary, {"variant": variant.to_dict(), "source": source})
        copy_tokenizers(folder, temporary, variant)

    checkpoint.write_tree(out, leaves, extra=extra)
    return out


def random_checkpoint(out, name, **fields):
    """A checkpoint that never was a Hugging Face folder, with few words; returns its variant."""
    variant = get_variant(name).replace(**{"qformer.vocab": 99, "llm.vocab": 101, **fields})
    rng = np.random.default_rng(0)
    leaves = {
        path: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32)
        for path, leaf in checkpoint.flatten(param_shapes(variant)).items()
    }
    checkpoint.write_tree(
        out,
        leaves.items(),
        extra=lambda folder: checkpoint.write_config(folder, {"variant": variant.to_dict()}),
    )
    return variant


def assert_same_tensors(found, wanted, dropped=()):
    found, wanted = tensors(found), tensors(wanted)
    assert found.keys() == wanted.keys() - set(dropped)
    for key, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (wanted[key].dtype, wanted[key].shape), key
        assert torch.equal(bits(tensor), bits(wanted[key])), key


def load_in_transformers(folder, architecture="InstructBlipForConditionalGeneration"):
    """The stock model, which must find each of its tensors in the folder and nothing else."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own affair
        reader = getattr(transformers, architecture)
        model, info = reader.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [FLAN, VICUNA])
def test_there_and_back_is_bit_equal(small, tmp_path, name, dtype):
    source = small(name, dtype)
    ours = convert(source, tmp_path / "ours")
    seen = []
    export_hf(ours, tmp_path / "back", progress=seen.append)
    assert_same_tensors(tmp_path / "back", source)
    assert sum(seen) == checkpoint.manifest_bytes(checkpoint.read_manifest(ours)) + (
        4 * 88 * np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize  # the zeros of the key biases
    )
    again = convert(tmp_path / "back", tmp_path / "again")
    assert checkpoint.manifest_digest(again) == checkpoint.manifest_digest(ours)


@pytest.mark.parametrize("name", [FLAN, VICUNA])
def test_stock_transformers_loads_it(forge, tmp_path, name):
    source = forge(name)
    ours = convert(source, tmp_path / "ours")
    assert export_hf(ours, tmp_path / "back", shard_bytes=3_000_000) == []  # nothing to note
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    model = load_in_transformers(tmp_path / "back")
    wanted = tensors(source)
    state = model.state_dict()
    for key, tensor in wanted.items():
        assert torch.equal(state[key], tensor), key
    files = {path.name for path in source.rglob("*") if path.suffix != ".safetensors"}
    assert files <= {path.name for path in (tmp_path / "back").rglob("*")}
    for path in source.glob("qformer_tokenizer/*"):
        assert (
            tmp_path / "back" / "qformer_tokenizer" / path.name
        ).read_bytes() == path.read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.items() >= json.loads((source / "config.json").read_text()).items()
    assert config["architectures"] == ["InstructBlipForConditionalGeneration"]


def test_mixed_dtypes_come_back(small, tmp_path):
    """The released folders keep the query tokens in float32, and old ones T5's `wo` too."""

    def widen(state):
        for key in state:
            if key == "query_tokens" or key.endswith(".wo.weight"):
                state[key] = state[key].float()

    source = copy(small(FLAN, "float16"), tmp_path / "mixed", change=widen)
    ours = convert(source, tmp_path / "ours")
    manifest = checkpoint.read_manifest(ours)
    assert manifest["qformer/queries"]["dtype"] == "float32"
    assert manifest["llm/decoder/layers/mlp/out/kernel"]["dtype"] == "float32"
    assert manifest["llm/decoder/layers/mlp/in/kernel"]["dtype"] == "float16"
    export_hf(ours, tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)


def test_odd_bits_come_back(small, tmp_path):
    """Infinities, negative zeros and NaN payloads are bits like others."""

    def odd(state):
        tensor = state["language_projection.weight"].view(torch.int16)
        tensor.view(-1)[:5] = torch.tensor([0x7FC1, -32768, 0x7F80, -128, 0x0001]).short()

    source = copy(small(VICUNA, "bfloat16"), tmp_path / "odd", change=odd)
    export_hf(convert(source, tmp_path / "ours"), tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)


def test_dropped_buffers_stay_away_and_the_key_bias_is_zero(small, tmp_path):
    def add(state):
        state["qformer.embeddings.position_ids"] = torch.arange(512)[None]

    source = copy(small(FLAN), tmp_path / "source", change=add)
    export_hf(convert(source, tmp_path / "ours"), tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source, ["qformer.embeddings.position_ids"])
    for key, tensor in tensors(tmp_path / "back").items():
        if key.endswith("qkv.bias"):
            assert not tensor[88:176].any() and tensor[:88].all() and tensor[176:].all()


def test_tied_head_stays_tied_until_it_is_trained(small, tmp_path):
    def tie(state):
        del state["language_model.lm_head.weight"]

    source = copy(small(FLAN, "bfloat16"), tmp_path / "tied", change=tie)
    ours = convert(source, tmp_path / "ours")
    export_hf(ours, tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)

    leaves = dict(checkpoint.read_leaves(ours))
    leaves["llm/head/kernel"] = -leaves["llm/head/kernel"]
    config = checkpoint.read_config(ours)
    checkpoint.write_tree(
        tmp_path / "trained",
        leaves.items(),
        extra=lambda folder: checkpoint.write_config(folder, config),
    )
    export_hf(tmp_path / "trained", tmp_path / "untied")
    state = tensors(tmp_path / "untied")
    wanted = -state["language_model.shared.weight"]
    assert torch.equal(state["language_model.lm_head.weight"], wanted)


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-vicuna"])
def test_checkpoint_without_a_past_is_exported_too(tmp_path, name):
    ours = tmp_path / "ours"
    variant = random_checkpoint(ours, name, **{"qformer.image_norm_eps": 1e-6, "llm.pad_id": 0})
    notes = export_hf(ours, tmp_path / "hf")
    assert [note.split(":")[0] for note in notes] == [
        "the checkpoint has no tokenizer",
        "the checkpoint has no qformer_tokenizer",
        "the tokenizer has no <image> token",
    ]
    model = load_in_transformers(tmp_path / "hf")
    if name == "tiny-t5":
        assert model.config.text_config.dense_act_fn == "gelu"
        assert not model.config.text_config.scale_decoder_outputs
    found, params = hf_folder.read_hf(tmp_path / "hf")
    found = found.replace(**{"llm.pad_id": 0})  # LLaMA's is the tokenizer's, and there is none
    assert found == variant
    for path, array in checkpoint.read_leaves(ours):
        np.testing.assert_array_equal(checkpoint.flatten(params)[path], array)


def test_notes_say_what_the_format_cannot_hold(tmp_path):
    random_checkpoint(tmp_path / "ours", "tiny-vicuna")
    notes = export_hf(tmp_path / "ours", tmp_path / "hf")
    assert any("eps is 1e-05" in note and "1e-06" in note for note in notes)


def test_q_former_without_text_is_refused(tmp_path):
    ours = tmp_path / "ours"
    random_checkpoint(ours, "tiny-t5", **{"qformer.instruction_aware": False})
    with pytest.raises(ValueError, match="without the instruction branch"):
        export_hf(ours, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_image_tower_that_the_format_has_no_keys_for_is_refused(tmp_path):
    fields = {"vision.pre_norm": True, "vision.activation": "quick_gelu"}
    random_checkpoint(tmp_path / "ours", "tiny-t5", **fields)
    with pytest.raises(ValueError, match="image tower is CLIP ViT-L"):
        export_hf(tmp_path / "ours", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_damaged_checkpoint_leaves_no_export(tmp_path):
    ours = tmp_path / "ours"
    random_checkpoint(ours, "tiny-t5")
    (victim,) = (ours / "params" / "state" / "llm.decoder.layers.mlp.in.kernel").glob("[0-9]*")
    raw = bytearray(victim.read_bytes())
    raw[7] ^= 1
    victim.write_bytes(raw)
    with pytest.raises(checkpoint.CheckpointError, match="llm/decoder/layers/mlp/in/kernel"):
        export_hf(ours, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint folder"):
        export_hf(tmp_path, tmp_path / "hf")


def test_existing_folder_is_refused(tmp_path):
    ours = tmp_path / "ours"
    random_checkpoint(ours, "tiny-t5")
    with pytest.raises(FileExistsError, match="not overwritten"):
        export_hf(ours, ours)


def test_edited_source_config_is_what_comes_back(small, tmp_path):
    source = copy(small(VICUNA), tmp_path / "source")
    edit_config(source, lambda config: config.update(remark="kept as it was"))
    (source / "generation_config.json").write_text('{"max_length": 7}')
    export_hf(convert(source, tmp_path / "ours"), tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["remark"] == "kept as it was"
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {
        "max_length": 7
    }


def test_shards_without_room_for_a_byte_are_refused(tmp_path):
    random_checkpoint(tmp_path / "ours", "tiny-t5")
    for size in (0, -5, 2.5, True):
        with pytest.raises(ValueError, match=f"shard_bytes is {size}, expected"):
            export_hf(tmp_path / "ours", tmp_path / "hf", shard_bytes=size)
    assert not (tmp_path / "hf").exists()


def test_parts_of_a_tensor_of_different_dtypes_are_refused(tmp_path):
    random_checkpoint(tmp_path / "ours", "tiny-t5")
    model = read_stored_model(tmp_path / "ours")
    model.manifest["vision/layers/attention/query/kernel"]["dtype"] = "bfloat16"
    said = r"of different dtypes \['bfloat16', 'float32'\] in .*ours: convert or merge it again"
    with pytest.raises(ValueError, match=said):
        export_hf(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
