"""The sections of Hugging Face's config.json, one table of keys for each tower.

A row says which key fills which field of our dataclass of sizes, which values are allowed, and its
default. Keys for features that this package does not have must have one fixed value.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_instructblip.conversion.config_keys import (
    AXIS,
    COUNT,
    EPS,
    FLAG,
    ID,
    RATE,
    SIZE,
    Fixed,
    Key,
    Pair,
    Same,
    Section,
    Values,
    equal,
    number,
    one_of,
    text,
)
from jax_instructblip.models.variants import OptConfig, VisionConfig


def _write_vision(vision: VisionConfig) -> dict[str, Any]:
    """Returns no keys; raises a ValueError for a tower that the format cannot hold."""
    if vision.pre_norm or vision.key_bias or not vision.patch_bias or vision.activation != "gelu":
        raise ValueError(
            "the image tower is CLIP ViT-L (a norm before the blocks, QuickGELU), which Hugging "
            "Face's BLIP-2 cannot hold: `jax-instructblip merge` writes a checkpoint of this "
            "package"
        )
    return {}


EVA_VIT = Section(
    "vision_config",
    (
        Key("hidden_size", "width", AXIS, 1408),
        Key("intermediate_size", "mlp", AXIS, 6144),
        Key("num_hidden_layers", "layers", COUNT, 39),
        Key("num_attention_heads", "heads", SIZE, 16),
        Key("image_size", "image_size", SIZE, 224),
        Key("patch_size", "patch_size", AXIS, 14),
        Key("layer_norm_eps", "norm_eps", EPS, 1e-6),
        Fixed("hidden_act", "gelu"),
        Fixed("qkv_bias", True),
        Pair(lambda values: {}, _write_vision),
    ),
)
_TABLES = (  # the embeddings of a Q-Former that reads texts
    Key("vocab_size", "vocab", AXIS, 30522),
    Key("max_position_embeddings", "max_positions", AXIS, 512),
)
_BERT = (
    Key("hidden_size", "width", AXIS, 768),
    Key("num_hidden_layers", "layers", COUNT, 12),
    Key("num_attention_heads", "heads", SIZE, 12),
    Key("intermediate_size", "mlp", AXIS, 3072),
    Key("hidden_dropout_prob", "dropout", RATE, 0.1),
    Key("layer_norm_eps", "norm_eps", EPS, 1e-12),
    Key("encoder_hidden_size", "vision_width", AXIS, 1408),
    Same("attention_probs_dropout_prob", "hidden_dropout_prob", 0.1),
    Fixed("hidden_act", "gelu"),
    Fixed("cross_attention_frequency", 2),
    Fixed("position_embedding_type", "absolute", written=False),
)
QFORMER = Section("qformer_config", (*_TABLES, *_BERT))
BLIP2_QFORMER = Section("qformer_config", (*_BERT, Fixed("use_qformer_text_input", False)))
# use_qformer_text_input is False by default, so a folder without the key has no text branch.
BLIP2_ITM_QFORMER = Section(
    "qformer_config",
    (*_TABLES, *_BERT, Fixed("use_qformer_text_input", True)),
)


def _read_activation(values: Values) -> dict[str, Any]:
    feed_forward = values.checked("feed_forward_proj", text(), "gated-gelu")
    gate, _, activation = feed_forward.partition("-")
    if gate != "gated":
        values.fail("feed_forward_proj", "only gated T5 (v1.1, FlanT5) is supported")
    if "dense_act_fn" in values:
        return {"activation": values.checked("dense_act_fn", one_of(*ACTIVATIONS))}
    if gate == "gated" and activation not in ACTIVATIONS:
        values.fail("feed_forward_proj", f"supported: gated- and one of {', '.join(ACTIVATIONS)}")
    # 'gated-gelu' alone means the tanh approximation in transformers.
    return {"activation": "gelu_new" if activation == "gelu" else activation}


def _read_scale(values: Values) -> dict[str, Any]:
    tied = values.checked("tie_word_embeddings", FLAG_OR_NULL, True) is not False
    # transformers 5 has a key for it; before, tied embeddings implied it.
    scale = values.setdefault("scale_decoder_outputs", tied)
    if scale is None:
        return {"scale_decoder_outputs": tied}
    return {"scale_decoder_outputs": values.checked("scale_decoder_outputs", FLAG)}


def _read_buckets(values: Values) -> dict[str, Any]:
    """Fills no field; checks that T5's buckets of distances can be computed.

    The maximum distance must exceed the distances that have a bucket of their own.
    """
    buckets, furthest = "relative_attention_num_buckets", "relative_attention_max_distance"
    if SIZE.problems("", values[buckets]) or SIZE.problems("", values[furthest]):
        return {}  # the rows of these keys complain
    if values[buckets] < 4:
        values.fail(buckets, "expected at least 4")
    elif values[furthest] <= values[buckets] // 2:
        values.fail(furthest, f"expected more than half of the {values[buckets]} buckets")
    return {}


ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
FLAG_OR_NULL = dataclasses.replace(FLAG, optional=True)
T5 = Section(
    "text_config",
    (
        Key("d_model", "width", AXIS, 512),
        Key("d_kv", "head_width", SIZE, 64),
        Key("d_ff", "mlp", AXIS, 2048),
        Key("num_layers", "encoder_layers", COUNT, 6),
        Key("num_decoder_layers", "decoder_layers", COUNT, else_as="num_layers"),
        Key("num_heads", "heads", AXIS, 8),
        Key("vocab_size", "vocab", AXIS, 32128),
        Key("relative_attention_num_buckets", "relative_buckets", AXIS, 32),
        Key("relative_attention_max_distance", "relative_max_distance", SIZE, 128),
        Key("layer_norm_epsilon", "norm_eps", EPS, 1e-6),
        Key("dropout_rate", "dropout", RATE, 0.1),
        Key("pad_token_id", "pad_id", ID, 0),
        Key("eos_token_id", "eos_id", ID, 1),
        Key("decoder_start_token_id", "decoder_start_id", ID, else_as="pad_token_id"),
        Pair(
            _read_activation,
            lambda llm: {
                "feed_forward_proj": f"gated-{llm.activation.removesuffix('_new')}",
                "dense_act_fn": llm.activation,
            },
            {"feed_forward_proj": "relu"},
        ),
        Pair(
            _read_scale,
            lambda llm: {
                "scale_decoder_outputs": llm.scale_decoder_outputs,
                "tie_word_embeddings": llm.scale_decoder_outputs,  # older versions scale if true
            },
            {"tie_word_embeddings": True},
        ),
        Pair(_read_buckets, lambda llm: {}),
    ),
)


def _read_rope(values: Values) -> dict[str, Any]:
    """Returns the rotary base `rope_theta`, also from transformers 5's `rope_parameters`.

    Scaled rotary positions are refused.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(values.get(name) or {}, Mapping):
            values.fail(name, "expected an object or null")
            return {}
    scaling, rope = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}
    kind = scaling.get("type", scaling.get("rope_type", rope.get("rope_type", "default")))
    if kind != "default":
        values["rope_type"] = kind
        values.fail("rope_type", "supported: 'default'")
    name = "rope_parameters.rope_theta" if "rope_theta" in rope else "rope_theta"
    values[name] = rope.get("rope_theta", values["rope_theta"])
    return {"rope_theta": values.checked(name, ROPE_THETA)}


def _read_heads(values: Values) -> dict[str, Any]:
    """Fills no field; checks that there are as many key as query heads, of equal width."""
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if SIZE.problems("", heads) or SIZE.problems("", width):
        return {}  # the rows of these keys complain
    for name, wanted in (("num_key_value_heads", heads), ("head_dim", width // heads)):
        if values.get(name) is not None and not equal(values[name], wanted):
            values.fail(name, f"supported: {wanted!r}")
    return {}


def _check_tie(values: Values) -> dict[str, Any]:
    values.checked("tie_word_embeddings", FLAG_OR_NULL)
    return {}


ROPE_THETA = number(above=1, at_most=1e12)
LLAMA = Section(
    "text_config",
    (
        Key("hidden_size", "width", AXIS, 4096),
        Key("intermediate_size", "mlp", AXIS, 11008),
        Key("num_hidden_layers", "layers", COUNT, 32),
        Key("num_attention_heads", "heads", SIZE, 32),
        Key("vocab_size", "vocab", AXIS, 32000),
        Key("rms_norm_eps", "norm_eps", EPS, 1e-6),
        Key("max_position_embeddings", "max_positions", SIZE, 2048),
        Key("attention_dropout", "dropout", RATE, 0.0),
        Fixed("hidden_act", "silu"),
        Fixed("attention_bias", False),
        Fixed("mlp_bias", False),
        Pair(
            _read_heads,
            lambda llm: {"num_key_value_heads": llm.heads, "head_dim": llm.head_width},
        ),
        Pair(_read_rope, lambda llm: {"rope_theta": llm.rope_theta}, {"rope_theta": 10_000.0}),
        Pair(
            _check_tie,
            lambda llm: {
                "tie_word_embeddings": False,
                # Not read: `hf_config.tokenizer_ids` has those of the tokenizer.
                "bos_token_id": llm.bos_id,
                "eos_token_id": llm.eos_id,
                "pad_token_id": llm.pad_id,
            },
            {"tie_word_embeddings": False},
        ),
    ),
)


OPT_NORM_EPS = 1e-5  # of PyTorch's LayerNorm: the format has no key for it


def _read_embedding(values: Values) -> dict[str, Any]:
    """Fills no field; checks that the token embedding has the width of the model."""
    width = values["hidden_size"]
    if values.get("word_embed_proj_dim") is not None:
        if not equal(values["word_embed_proj_dim"], width):
            values.fail("word_embed_proj_dim", f"supported: {width!r}")
    return {}


def _write_norm(llm: OptConfig) -> dict[str, Any]:
    """Returns no keys, for the norm's eps has none; raises a ValueError unless it is 1e-5."""
    if llm.norm_eps != OPT_NORM_EPS:
        raise ValueError(
            f"llm.norm_eps is {llm.norm_eps}: an OPT folder of Hugging Face means 1e-5"
        )
    return {}


OPT = Section(
    "text_config",
    (
        Key("hidden_size", "width", AXIS, 768),
        Key("ffn_dim", "mlp", AXIS, 3072),
        Key("num_hidden_layers", "layers", COUNT, 12),
        Key("num_attention_heads", "heads", SIZE, 12),
        Key("vocab_size", "vocab", AXIS, 50272),
        Key("max_position_embeddings", "max_positions", AXIS, 2048),  # the table has two rows more
        Key("dropout", "dropout", RATE, 0.1),
        Key("pad_token_id", "pad_id", ID, 1),
        Key("bos_token_id", "bos_id", ID, 2),
        Key("eos_token_id", "eos_id", ID, 2),  # BLIP-2's folders say 50118, the line break
        Fixed("activation_function", "relu"),
        Fixed("do_layer_norm_before", True),
        Fixed("enable_bias", True),
        Fixed("layer_norm_elementwise_affine", True),
        Fixed("attention_dropout", 0.0),
        Fixed("layerdrop", 0.0),
        Fixed("tie_word_embeddings", True),
        Fixed("_remove_final_layer_norm", False, written=False),
        Pair(_read_embedding, lambda llm: {"word_embed_proj_dim": llm.width}),
        Pair(lambda values: {}, _write_norm),
    ),
)
