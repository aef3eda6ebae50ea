"""Reading config.json: sizes, and fields whose values differ between releases."""

import json

import pytest

from jax_instructblip.conversion import hf_config, llama_sections, sections
from jax_instructblip.conversion.safetensors import ConversionError
from tests.helpers.hf_folders import edit_config

VICUNA = "instructblip-vicuna-7b"
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


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
        config["text_config"].update(num_key_value_heads=3, rope_scaling={"type": "dynamic"})
        config["text_config"].update(attention_bias=True)

    with pytest.raises(ConversionError) as error:
        variant_after(vicuna, tmp_path, odd_llama)
    assert sorted(line.split(" is ")[0] for line in error.value.failures) == [
        "text_config.attention_bias",
        "text_config.num_key_value_heads",
        "text_config.rope_type",
    ]
    with pytest.raises(
        ConversionError, match="'gpt2'; supported language models: llama, mistral, opt, qwen2"
    ):
        variant_after(flan, tmp_path, lambda c: c["text_config"].update(model_type="gpt2"))
    with pytest.raises(ConversionError, match="do not fit together"):
        variant_after(flan, tmp_path, lambda c: c["qformer_config"].update(encoder_hidden_size=99))


def test_defaults_are_those_of_transformers():
    """A folder leaves out what equals them; `vocab_size` 30522 is no slip."""
    import transformers

    made = {
        transformers.InstructBlipVisionConfig: sections.EVA_VIT.defaults,
        transformers.InstructBlipQFormerConfig: sections.QFORMER.defaults,
        transformers.T5Config: sections.T5.defaults,
        transformers.LlamaConfig: llama_sections.SECTIONS["llama"].defaults,
        transformers.MistralConfig: llama_sections.SECTIONS["mistral"].defaults,
        transformers.Qwen2Config: llama_sections.SECTIONS["qwen2"].defaults,
        transformers.Qwen3Config: llama_sections.SECTIONS["qwen3"].defaults,
    }
    # Not in the config classes of today: the one position embedding there is, RoPE in a new place.
    # Width of a head and window are worked out from others in `to_dict`.
    gone = {"position_embedding_type", "rope_theta", "head_dim", "sliding_window"}
    gone |= {"num_key_value_heads"}
    for config, ours in made.items():
        theirs = config().to_dict()
        assert {key: theirs[key] for key in ours if key not in gone} == {
            key: value for key, value in ours.items() if key not in gone
        }, config
    for config in list(made)[3:]:
        assert config().rope_parameters["rope_theta"] == 10_000.0
    assert transformers.MistralConfig().sliding_window == transformers.Qwen2Config.sliding_window
    assert transformers.MistralConfig().num_key_value_heads == 8
    assert transformers.Qwen3Config().head_dim == 128


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("", "vision_config", [3], "vision_config is a list, expected an object"),
        ("", "text_config", "t5", "text_config is text, expected an object"),
        ("", "num_query_tokens", 8.5, "num_query_tokens is 8.5, expected a whole number"),
        ("", "image_token_index", 10**9, "image_token_index is 1000000000, expected an id below"),
        ("", "image_token_index", "299", "image_token_index is '299', expected an id below"),
        ("", "quantization_config", {"quant_method": "fp8"}, "take the release in bfloat16"),
        ("", "use_decoder_only_language_model", True, "_model is True; expected False"),
        ("text_config", "model_type", ["t5"], "text_config.model_type is ['t5']; supported"),
        ("text_config", "eos_token_id", 1.5, "text_config.eos_token_id is 1.5"),
        ("text_config", "decoder_start_token_id", 10**9, "below the vocab_size 300"),
        ("text_config", "feed_forward_proj", 5, "text_config.feed_forward_proj is 5, expected"),
        ("text_config", "scale_decoder_outputs", "no", "scale_decoder_outputs is 'no', expected"),
        ("text_config", "relative_attention_max_distance", 16, "more than half of the 32 buckets"),
        ("text_config", "relative_attention_num_buckets", 3, "num_buckets is 3; expected at least"),
        ("vision_config", "layer_norm_eps", -1e-6, "layer_norm_eps is -1e-06, expected at least"),
        ("vision_config", "num_hidden_layers", 2**40, "num_hidden_layers is 1099511627776"),
        ("qformer_config", "num_hidden_layers", 3, "qformer.layers 3 is odd"),
    ],
)
def test_nonsense_in_a_config_is_one_sentence(flan, tmp_path, section, key, value, said):
    def change(config):
        (config[section] if section else config)[key] = value

    with pytest.raises(ConversionError) as error:
        variant_after(flan, tmp_path, change)
    assert [said in line for line in error.value.failures] == [True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": 0, "rope_parameters": None}, "rope_theta is 0, expected above 1"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta is 'x', expected"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]; expected an object"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'; supported: 'default', 'l"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None, expected a number"),
        ({"rope_parameters": LLAMA3 | {"factor": 0.5}}, "rope_parameters.factor is 0.5, expected"),
        (
            {"rope_parameters": LLAMA3 | {"high_freq_factor": 1}},
            "high_freq_factor is 1; expected more than low_freq_factor 1",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of num_att"),
        ({"head_dim": 8.0}, "head_dim is 8.0, expected a whole number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1, expected at least 1"),
    ],
)
def test_nonsense_about_llama_is_one_sentence(vicuna, tmp_path, change, said):
    with pytest.raises(ConversionError) as error:
        variant_after(vicuna, tmp_path, lambda config: config["text_config"].update(change))
    assert [said in line for line in error.value.failures] == [True]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", {"added_tokens": {"a": 1}}, "added_tokens is an object, expected a l"),
        ("tokenizer.json", {"added_tokens": [5, {"id": "x", "content": "<pad>"}]}, "has the id"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "is a list, expected an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "the id 'x'"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5, expected a token's text"),
        ("tokenizer_config.json", {"pad_token": {"content": []}}, "expected a token's text"),
        ("added_tokens.json", {"<pad>": 1.5}, "has the id 1.5"),
        ("special_tokens_map.json", {"bos_token": ["<s>"]}, "bos_token is ['<s>'], expected"),
    ],
)
def test_nonsense_in_a_tokenizer_is_told(vicuna, tmp_path, name, content, said):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ConversionError) as error:
        variant_after(vicuna, tmp_path, lambda config: None)
    assert all(said in line for line in error.value.failures)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("image_mean", [0.5, 0.5, 0.5], "image_mean is [0.5, 0.5, 0.5]; supported: [0.48145466"),
        ("image_std", "x", "image_std is 'x'; supported"),
        ("image_std", [0.26862954], "image_std is [0.26862954]; supported"),
        ("size", {"shortest_edge": 56}, "size is {'shortest_edge': 56}; supported: {'height'"),
        ("size", {"height": 56, "width": 57}, "size is {'height': 56, 'width': 57}; supported"),
        ("resample", 2, "resample is 2; supported: 3"),
        ("do_normalize", False, "do_normalize is False; supported: True"),
        ("do_rescale", 1, "do_rescale is 1; supported: True"),
        ("do_center_crop", True, "do_center_crop is True; supported: False"),
        ("rescale_factor", 1, "rescale_factor is 1; supported: 0.0039"),
    ],
)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_images_that_are_prepared_otherwise_are_refused(flan, tmp_path, name, key, value, said):
    variant = variant_after(flan, tmp_path, lambda config: None)

    def write(settings):
        inner = {"image_processor": settings} if name == "processor_config.json" else settings
        (tmp_path / name).write_text(json.dumps(inner))

    write(hf_config.preprocessor(variant) | {"size": 56, "image_mean": None, "new": [5]})
    hf_config.check_preprocessor(tmp_path, variant)
    write(json.loads((flan / "preprocessor_config.json").read_text()) | {key: value})
    with pytest.raises(ConversionError, match="prepared otherwise than here") as error:
        hf_config.check_preprocessor(tmp_path, variant)
    (line,) = error.value.failures
    assert line.startswith(f"{name}: {said}")


def test_numbers_that_json_has_not_are_refused_with_the_file(flan, tmp_path):
    text = (flan / "config.json").read_text().replace("1e-12", "NaN")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConversionError, match="not valid JSON: NaN is no number here"):
        hf_config.read_config(tmp_path)
    for document in ([], 5, "text", None):
        (tmp_path / "config.json").write_text(json.dumps(document))
        with pytest.raises(ConversionError, match="at the top, expected an object"):
            hf_config.read_config(tmp_path)
    for named in (5, {"a": 1}, "InstructBlip", [["x"]], True):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": named}))
        with pytest.raises(ConversionError, match="whose architecture is not supported"):
            hf_config.read_config(tmp_path)
