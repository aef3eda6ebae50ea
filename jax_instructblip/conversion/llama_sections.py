"""The text_config of LLaMA and its relatives: Mistral, Qwen 2 and Qwen 3.

Each of these sections of config.json fills the same dataclass of sizes, `LlamaConfig`. Most of
their keys have the same names, but other defaults; some models have keys of their own.
"""

from collections.abc import Mapping
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
    SIZE_OR_NULL,
    Fixed,
    Key,
    Pair,
    Section,
    Values,
    number,
)
from jax_instructblip.models.variants import LlamaConfig

ROPE_THETA = number(above=1, at_most=1e12)
ROPE_FACTOR = number(1, at_most=1e6)
TURNS = number(above=0, at_most=1e6)
ROPE_KINDS = ("default", "linear", "llama3")
LAYER_TYPES = ("full_attention", "sliding_attention")
_LLAMA3 = {  # a key of the scaling by our field
    "rope_low_turns": "low_freq_factor",
    "rope_high_turns": "high_freq_factor",
    "rope_original_positions": "original_max_position_embeddings",
}


def _read_rope(values: Values) -> dict[str, Any]:
    """Returns the rotary base and its scaling, from the keys of transformers 4 or 5.

    Those of 4 are `rope_theta` and `rope_scaling`; 5 has both in `rope_parameters`. A scaling of
    another kind than `ROPE_KINDS` is refused.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(values.get(name) or {}, Mapping):
            values.fail(name, "expected an object or null")
            return {}
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(name) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    parameters = values.get("rope_parameters") or {}

    def read(key: str, field: Any, default: Any = None) -> Any:
        values[f"{name}.{key}"] = rope.get(key, default)
        return values.checked(f"{name}.{key}", field)

    theta = "rope_parameters.rope_theta" if "rope_theta" in parameters else "rope_theta"
    values[theta] = parameters.get("rope_theta", values["rope_theta"])
    fields: dict[str, Any] = {"rope_theta": values.checked(theta, ROPE_THETA)}
    partial = values.get("partial_rotary_factor", rope.get("partial_rotary_factor"))
    if partial not in (None, 1):
        values["partial_rotary_factor"] = partial
        values.fail("partial_rotary_factor", "supported: 1 (rotary positions turn whole heads)")
    if kind == "default":
        return fields
    if kind not in ROPE_KINDS:
        values["rope_type"] = kind
        values.fail("rope_type", f"supported: {', '.join(map(repr, ROPE_KINDS))}")
        return fields
    fields |= {"rope_scaling": kind, "rope_factor": read("factor", ROPE_FACTOR)}
    if kind == "llama3":
        for field, key in _LLAMA3.items():
            whole_number = field == "rope_original_positions"
            default = values["max_position_embeddings"] if whole_number else None
            fields[field] = read(key, SIZE if whole_number else TURNS, default)
        low, high = fields["rope_low_turns"], fields["rope_high_turns"]
        if low is not None and high is not None and high <= low:
            values.fail(f"{name}.high_freq_factor", f"expected more than low_freq_factor {low}")
    return fields


def _write_rope(llm: LlamaConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope_theta": llm.rope_theta}
    if llm.rope_scaling != "none":
        scaling = {"rope_type": llm.rope_scaling, "factor": llm.rope_factor}
        if llm.rope_scaling == "llama3":
            scaling |= {key: getattr(llm, field) for field, key in _LLAMA3.items()}
        keys["rope_scaling"] = scaling
    return keys


def _read_heads(values: Values) -> dict[str, Any]:
    """Returns the number of key heads and the width of a head, 0 if they are the usual ones."""
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if SIZE.problems("", heads) or SIZE.problems("", width):
        return {}  # the rows of these keys complain
    numbers = []
    for name, usual in (("num_key_value_heads", heads), ("head_dim", width / heads)):
        value = values.get(name)
        value = usual if value is None else values.checked(name, SIZE, usual)
        numbers.append(0 if value == usual else value)
    if numbers[0] and heads % numbers[0]:
        values.fail("num_key_value_heads", f"expected a divisor of num_attention_heads {heads}")
    return {"key_value_heads": numbers[0], "head_size": numbers[1]}


def _write_heads(llm: LlamaConfig) -> dict[str, Any]:
    return {"num_key_value_heads": llm.cached_heads, "head_dim": llm.head_width}


def _read_tie(values: Values) -> dict[str, Any]:
    return {"tied_head": values.checked("tie_word_embeddings", FLAG_OR_NULL) is True}


def _write_tie(llm: LlamaConfig) -> dict[str, Any]:
    return {
        "tie_word_embeddings": llm.tied_head,
        # Not read: `hf_config.tokenizer_ids` has those of the tokenizer.
        "bos_token_id": llm.bos_id,
        "eos_token_id": llm.eos_id,
        "pad_token_id": llm.pad_id,
    }


def _read_window(values: Values) -> dict[str, Any]:
    return {"sliding_window": values.checked("sliding_window", SIZE_OR_NULL) or 0}


def _read_windows(values: Values) -> dict[str, Any]:
    """Returns Qwen's sliding window, 0 if it is off or no layer has it."""
    used, window = values.checked("use_sliding_window", FLAG), _read_window(values)
    values.checked("max_window_layers", ID)
    types = values.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or not all(each in LAYER_TYPES for each in types):
            values.fail("layer_types", f"expected a list of {' and '.join(LAYER_TYPES)}")
        elif used is False and LAYER_TYPES[1] in types:
            values.fail("layer_types", "expected full_attention: use_sliding_window is false")
        elif LAYER_TYPES[1] not in types:
            used = False
    return window if used else {"sliding_window": 0}


def _write_windows(llm: LlamaConfig) -> dict[str, Any]:
    window = llm.sliding_window
    keys = {"use_sliding_window": bool(window), "sliding_window": window or None}
    return keys | ({"max_window_layers": 0} if window else {})


def _section(
    *rows: Fixed | Pair,
    mlp: int,
    vocab: int = 151936,
    positions: int = 32768,
    key_heads: int | None = 32,
    head_width: int | None = None,
) -> Section:
    """Returns the section of one model.

    `rows` are for keys that this model alone has; the other arguments are transformers' defaults.
    """
    heads = {"num_key_value_heads": key_heads, "head_dim": head_width}
    return Section(
        "text_config",
        (
            Key("hidden_size", "width", AXIS, 4096),
            Key("intermediate_size", "mlp", AXIS, mlp),
            Key("num_hidden_layers", "layers", COUNT, 32),
            Key("num_attention_heads", "heads", SIZE, 32),
            Key("vocab_size", "vocab", AXIS, vocab),
            Key("rms_norm_eps", "norm_eps", EPS, 1e-6),
            Key("max_position_embeddings", "max_positions", SIZE, positions),
            Key("attention_dropout", "dropout", RATE, 0.0),
            Fixed("hidden_act", "silu"),
            Pair(_read_heads, _write_heads, heads),
            Pair(_read_rope, _write_rope, {"rope_theta": 10_000.0}),
            Pair(_read_tie, _write_tie, {"tie_word_embeddings": False}),
            *rows,
        ),
    )


def _has(field: str) -> Pair:
    """Returns a row that sets `field` to True and has no key: the model always has the feature."""
    return Pair(lambda values: {field: True}, lambda llm: {})


_NO_BIAS = Fixed("attention_bias", False)
_WINDOWS = Pair(
    _read_windows,
    _write_windows,
    {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
)
SECTIONS = {  # by model_type
    "llama": _section(
        _NO_BIAS, Fixed("mlp_bias", False), mlp=11008, vocab=32000, positions=2048, key_heads=None
    ),
    "mistral": _section(
        Pair(
            _read_window,
            lambda llm: {"sliding_window": llm.sliding_window or None},
            {"sliding_window": 4096},
        ),
        mlp=14336,
        vocab=32000,
        positions=4096 * 32,
        key_heads=8,
    ),
    "qwen2": _section(_has("key_bias"), _WINDOWS, mlp=22016),
    "qwen3": _section(_has("key_norm"), _NO_BIAS, _WINDOWS, mlp=22016, head_width=128),
}


def model_type(llm: LlamaConfig) -> str:
    """Returns the `model_type` of transformers that has these features, a key of `SECTIONS`.

    Raises:
        ValueError: no model of transformers has them all.
    """
    if llm.key_bias and llm.key_norm:
        raise ValueError(
            "llm has key_bias and key_norm: no language model of transformers has both; "
            f"known: {', '.join(SECTIONS)}"
        )
    if llm.key_bias or llm.key_norm:
        return "qwen2" if llm.key_bias else "qwen3"
    return "mistral" if llm.sliding_window else "llama"
