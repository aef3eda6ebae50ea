"""What a folder's config.json makes of the sizes and the fields that sources disagree on."""

import json

import pytest

from jax_instructblip.convert import hf_config
from jax_instructblip.convert.safetensors import ConversionError
from tests.convert.folders import edit_config

VICUNA = "instructblip-vicuna-7b"


def variant_after(folder, out, change):
    """The variant of a folder whose config was edited."""
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    edit_config(out, change)
    return hf_config.variant_of(out, hf_config.read_config(out))


@pytest.mark.parametrize(
    ("scale", "tie", "wanted"),
    [
        (None, None, True),
        (None, True, True),
        (None, False, False),
        (False, True, False),
        (True, False, True),
    ],
)
def test_decoder_outputs_are_scaled_as_the_folder_means_it(flan, tmp_path, scale, tie, wanted):
    def change(config):
        text = config["text_config"]
        for key, value in (("scale_decoder_outputs", scale), ("tie_word_embeddings", tie)):
            text.pop(key)
            if value is not None:
                text[key] = value

    assert variant_after(flan, tmp_path, change).llm.scale_decoder_outputs is wanted


def test_activation_is_the_written_one(flan, tmp_path):
    def activation(change):
        return variant_after(flan, tmp_path, lambda c: change(c["text_config"])).llm.activation

    assert activation(lambda text: None) == "gelu"
    assert activation(lambda text: text.pop("dense_act_fn")) == "gelu_new"
    assert activation(lambda text: text.update(dense_act_fn="gelu_new")) == "gelu_new"
    assert (
        activation(lambda t: (t.pop("dense_act_fn"), t.update(feed_forward_proj="gated-silu")))
        == "silu"
    )


def test_image_norm_takes_the_eps_of_the_vision_tower(flan, tmp_path):
    def change(config):
        config["vision_config"]["layer_norm_eps"] = 1e-5

    variant = variant_after(flan, tmp_path, change)
    assert variant.qformer.image_norm_eps == variant.vision.norm_eps == 1e-5


def test_llama_ids_are_those_of_the_tokenizer(forge, tmp_path):
    vicuna = forge(VICUNA)

    def wrong(config):
        config["text_config"].update(bos_token_id=0, eos_token_id=1, pad_token_id=-1)

    llm = variant_after(vicuna, tmp_path, wrong).llm  # no tokenizer here: the released ids
    assert (llm.bos_id, llm.eos_id, llm.pad_id) == (2, 2, 32000)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((vicuna / name).read_bytes())
    llm = variant_after(vicuna, tmp_path, wrong).llm
    assert (llm.bos_id, llm.eos_id, llm.pad_id) == (2, 2, 32000)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"bos_token": {"content": "<s>"}, "pad_token": "<pad>"}
    settings["added_tokens_decoder"] = {"32002": {"content": "<pad>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    llm = variant_after(vicuna, tmp_path, wrong).llm
    assert (llm.bos_id, llm.eos_id, llm.pad_id) == (1, 2, 32002)
    settings["added_tokens_decoder"] = {"32003": {"content": "<pad>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match="pad_id is 32003, the vocabulary has 32003"):
        variant_after(vicuna, tmp_path, wrong)


def test_what_the_network_does_not_do_is_refused_all_at_once(flan, vicuna, tmp_path):
    def odd_t5(config):
        config["vision_config"].update(hidden_act="quick_gelu", qkv_bias=False)
        config["qformer_config"].update(cross_attention_frequency=3, hidden_dropout_prob=0.2)
        config["text_config"].update(feed_forward_proj="relu", dense_act_fn="tanh")

    with pytest.raises(ConversionError) as error:
        variant_after(flan, tmp_path, odd_t5)
    starts = [line.split(" is ")[0] for line in error.value.failures]
    assert sorted(starts) == [
        "qformer_config.attention_probs_dropout_prob",
        "qformer_config.cross_attention_frequency",
        "text_config.dense_act_fn",
        "text_config.feed_forward_proj",
        "vision_config.hidden_act",
        "vision_config.qkv_bias",
    ]

    def odd_llama(config):
        config["text_config"].update(num_key_value_heads=2, rope_scaling={"type": "linear"})
        config["text_config"].update(attention_bias=True)

    with pytest.raises(ConversionError) as error:
        variant_after(vicuna, tmp_path, odd_llama)
    assert sorted(line.split(" is ")[0] for line in error.value.failures) == [
        "text_config.attention_bias",
        "text_config.num_key_value_heads",
        "text_config.rope_type",
    ]
    with pytest.raises(ConversionError, match="'opt'; supported language models: llama, t5"):
        variant_after(flan, tmp_path, lambda c: c["text_config"].update(model_type="opt"))
    with pytest.raises(ConversionError, match="do not fit together"):
        variant_after(flan, tmp_path, lambda c: c["qformer_config"].update(encoder_hidden_size=99))


def test_defaults_are_those_of_transformers():
    """A folder leaves out what equals them; `vocab_size` 30522 is no slip."""
    import transformers

    made = {
        transformers.InstructBlipVisionConfig: hf_config.VISION_DEFAULTS,
        transformers.InstructBlipQFormerConfig: hf_config.QFORMER_DEFAULTS,
        transformers.T5Config: hf_config.T5_DEFAULTS,
        transformers.LlamaConfig: hf_config.LLAMA_DEFAULTS,
    }
    # Not in the config classes of today: the one position embedding there is, RoPE in a new place.
    gone = {"position_embedding_type", "rope_theta"}
    for config, ours in made.items():
        theirs = config().to_dict()
        assert {key: theirs[key] for key in ours if key not in gone} == {
            key: value for key, value in ours.items() if key not in gone
        }, config
    assert transformers.LlamaConfig().rope_parameters["rope_theta"] == 10_000.0
