"""The sections of Hugging Face's config.json, one table of keys for each tower.

A row says which key fills which field of our dataclass of sizes, which values are allowed, and its
default. Keys for features that this package does not have must have one fixed value. The rows of
LLaMA and its relatives are in `llama_sections.py`.
"""

from typing import Any

from jax_instructblip.conversion.config_keys import (
    AXIS,
    COUNT,
    EPS,
    FLAG,
    FLAG_OR_NULL,
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


def _write_clip(vision: VisionConfig) -> dict[str, Any]:
    """Returns no keys; raises a ValueError for a tower that is not CLIP's before its last block."""
    clip = vision.pre_norm and vision.key_bias and not vision.patch_bias
    if not clip or vision.unused_layers != 1 or not vision.post_norm:
        raise ValueError(
            "the image tower is not CLIP's with its last block and norm (pre_norm, key_bias, no "
            "patch_bias, unused_layers 1, post_norm), which Hugging Face's LLaVA holds: "
            "`jax-instructblip merge` writes a checkpoint of this package"
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
CLIP_VIT = Section(  # of LLaVA, whose features are those before the last block
    "vision_config",
    (
        Fixed("model_type", "clip_vision_model"),
        Key("hidden_size", "width", AXIS, 768),
        Key("intermediate_size", "mlp", AXIS, 3072),
        Key("num_hidden_layers", "layers", COUNT, 12),
        Key("num_attention_heads", "heads", SIZE, 12),
        Key("image_size", "image_size", SIZE, 224),
        Key("patch_size", "patch_size", AXIS, 32),
        Key("layer_norm_eps", "norm_eps", EPS, 1e-5),
        Key("hidden_act", "activation", one_of("gelu", "quick_gelu"), "quick_gelu"),
        Fixed("num_channels", 3),
        Fixed("attention_dropout", 0.0),
        Pair(
            lambda values: {
                "pre_norm": True,
                "key_bias": True,
                "patch_bias": False,
                "unused_layers": 1,
                "post_norm": True,
            },
            _write_clip,
        ),
    ),
)


def _read_projector(values: Values) -> dict[str, Any]:
    activations = one_of(*PROJECTOR_LAYERS)
    activation = values.checked("projector_hidden_act", activations, "gelu")
    return {"layers": PROJECTOR_LAYERS[activation]}


# `linear` is no activation: the second of the two layers that the format has must then be the
# identity (`tables/projector.py`).
PROJECTOR_LAYERS = {"linear": 1, "gelu": 2}
PROJECTOR = Section(
    "",
    (
        Pair(
            _read_projector,
            lambda bridge: {"projector_hidden_act": "linear" if bridge.layers == 1 else "gelu"},
            {"projector_hidden_act": "gelu"},
        ),
        Fixed("vision_feature_layer", -2),
        Fixed("vision_feature_select_strategy", "default"),
        Fixed("multimodal_projector_bias", True),
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
