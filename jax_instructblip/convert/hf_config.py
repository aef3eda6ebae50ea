"""The config.json of a Hugging Face InstructBLIP folder -> a variant.

Sizes are as the file has them. What the sources disagree on is taken from it too: the image norm's
eps, T5's activation, the scaling of decoder outputs. Only LLaMA's special ids are the tokenizer's.
"""

from pathlib import Path
from typing import Any

from jax_instructblip import files
from jax_instructblip.convert.safetensors import ConversionError
from jax_instructblip.models.variants import (
    VARIANTS,
    LlamaConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
    get_variant,
)

ARCHITECTURE, MODEL_TYPE = "InstructBlipForConditionalGeneration", "instructblip"
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "spiece.model tokenizer.model"
).split()
SENTENCEPIECE_IDS = {"<unk>": 0, "<s>": 1, "</s>": 2}  # LLaMA's, where no file lists them

# What a config.json means by leaving a key out: transformers writes only what differs from these.
VISION_DEFAULTS = dict(
    hidden_size=1408,
    intermediate_size=6144,
    num_hidden_layers=39,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    qkv_bias=True,
)
QFORMER_DEFAULTS = dict(
    vocab_size=30522,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    hidden_act="gelu",
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    max_position_embeddings=512,
    layer_norm_eps=1e-12,
    cross_attention_frequency=2,
    encoder_hidden_size=1408,
    position_embedding_type="absolute",
)
T5_DEFAULTS = dict(
    vocab_size=32128,
    d_model=512,
    d_kv=64,
    d_ff=2048,
    num_layers=6,
    num_heads=8,
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    dropout_rate=0.1,
    layer_norm_epsilon=1e-6,
    feed_forward_proj="relu",
    pad_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=True,
)
LLAMA_DEFAULTS = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    hidden_act="silu",
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    attention_bias=False,
    attention_dropout=0.0,
    mlp_bias=False,
    tie_word_embeddings=False,
)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of an InstructBLIP folder; ConversionError where it is another model's."""
    wanted = "a Hugging Face folder: config.json, *.safetensors and tokenizers"
    if not folder.is_dir():
        there = "is a file" if folder.exists() else "does not exist"
        raise ConversionError(f"{folder} {there}", [f"expected {wanted}"])
    config = read_json(folder / "config.json")
    if "format" in config and "variant" in config:
        raise ConversionError(
            f"{folder} is converted already", [f"found a checkpoint folder, expected {wanted}"]
        )
    architectures = config.get("architectures") or []
    named = architectures or [config.get("model_type")]
    if named not in ([ARCHITECTURE], [MODEL_TYPE]):
        raise ConversionError(
            f"{folder} holds another architecture",
            [f"found {', '.join(map(str, named))}; supported: {ARCHITECTURE}"],
        )
    return config


def variant_of(folder: Path, config: dict[str, Any]) -> Variant:
    """The variant that a config.json describes; ConversionError with all that cannot be held."""
    reader = _ConfigReader(folder, config)
    try:
        variant = reader.variant()
    except (ValueError, TypeError, KeyError) as error:
        reader.failures.append(str(error))
        variant = None
    if reader.failures or variant is None:
        raise ConversionError(f"{folder}/config.json cannot be held", reader.failures)
    return variant


def has_tied_embeddings(config: dict[str, Any]) -> bool:
    """Whether the config lets the language model's head share the embedding."""
    text = config["text_config"]
    defaults = T5_DEFAULTS if text["model_type"] == "t5" else LLAMA_DEFAULTS
    return {**defaults, **text}["tie_word_embeddings"] is not False


def name_of(variant: Variant) -> str | None:
    """The released variant that has these sizes, if there is one."""
    return next((name for name, known in VARIANTS.items() if not _unlike(variant, known)), None)


def check_variant(folder: Path, found: Variant, name: str) -> None:
    """Raises ConversionError where the sizes found are not those of the variant of that name."""
    differences = _unlike(found, get_variant(name))
    if differences:
        fits = name_of(found)
        hint = f"it fits {fits}" if fits else "no released variant has its sizes"
        raise ConversionError(f"{folder} is not {name}; {hint}", differences)


def read_json(path: Path) -> Any:
    """What a JSON file holds; ConversionError where it is missing or no JSON."""
    try:
        return files.read_json(path, dict, limit=files.TOKENIZER_LIMIT)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read", [str(error)]) from error


class _ConfigReader:
    """Reads the three towers of a config and collects what this network does not do."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.folder, self.config = folder, config
        self.failures: list[str] = []

    def variant(self) -> Variant:
        """The whole variant; whatever does not fit is added to `failures`."""
        eyes = self._section("vision_config", VISION_DEFAULTS)
        former = self._section("qformer_config", QFORMER_DEFAULTS)
        kind = (self.config.get("text_config") or {}).get("model_type")
        if kind not in ("t5", "llama"):
            raise ValueError(
                f"text_config.model_type is {kind!r}; supported language models: llama, t5"
            )
        llm = self._t5() if kind == "t5" else self._llama()
        self._demand("vision_config", eyes, hidden_act="gelu", qkv_bias=True)
        self._demand(
            "qformer_config",
            former,
            hidden_act="gelu",
            cross_attention_frequency=2,
            position_embedding_type="absolute",
            attention_probs_dropout_prob=former["hidden_dropout_prob"],
        )
        return Variant(
            "instructblip",
            VisionConfig(
                image_size=eyes["image_size"],
                patch_size=eyes["patch_size"],
                width=eyes["hidden_size"],
                layers=eyes["num_hidden_layers"],
                heads=eyes["num_attention_heads"],
                mlp=eyes["intermediate_size"],
                norm_eps=eyes["layer_norm_eps"],
            ),
            QFormerConfig(
                vision_width=former["encoder_hidden_size"],
                llm_width=llm.width,
                width=former["hidden_size"],
                layers=former["num_hidden_layers"],
                heads=former["num_attention_heads"],
                mlp=former["intermediate_size"],
                vocab=former["vocab_size"],
                max_positions=former["max_position_embeddings"],
                queries=self.config.get("num_query_tokens", 32),
                norm_eps=former["layer_norm_eps"],
                # Hugging Face normalises the tower's output with the tower's eps; LAVIS has 1e-5.
                image_norm_eps=eyes["layer_norm_eps"],
                dropout=former["hidden_dropout_prob"],
            ),
            llm,
        )

    def _t5(self) -> T5Config:
        text = self._section("text_config", T5_DEFAULTS)
        gate, _, activation = text["feed_forward_proj"].partition("-")
        if gate != "gated":
            self.failures.append(
                f"text_config.feed_forward_proj is {text['feed_forward_proj']!r}; only gated T5 "
                "(v1.1, FlanT5) is supported"
            )
        if activation == "gelu":  # what transformers makes of 'gated-gelu' where no key says more
            activation = "gelu_new"
        activation = text.get("dense_act_fn", activation)
        if activation not in ("gelu", "gelu_new", "relu", "silu"):
            self.failures.append(
                f"text_config.dense_act_fn is {activation!r}; supported: gelu, gelu_new, relu, silu"
            )
            activation = "gelu"  # reading goes on, to report the rest as well
        return T5Config(
            width=text["d_model"],
            head_width=text["d_kv"],
            heads=text["num_heads"],
            mlp=text["d_ff"],
            encoder_layers=text["num_layers"],
            decoder_layers=text.get("num_decoder_layers") or text["num_layers"],
            vocab=text["vocab_size"],
            relative_buckets=text["relative_attention_num_buckets"],
            relative_max_distance=text["relative_attention_max_distance"],
            norm_eps=text["layer_norm_epsilon"],
            activation=activation,
            # transformers 5 states it; before, tied embeddings meant it.
            scale_decoder_outputs=text.get(
                "scale_decoder_outputs", has_tied_embeddings(self.config)
            ),
            dropout=text["dropout_rate"],
            pad_id=text["pad_token_id"],
            eos_id=text["eos_token_id"],
            decoder_start_id=text.get("decoder_start_token_id", text["pad_token_id"]),
        )

    def _llama(self) -> LlamaConfig:
        text = self._section("text_config", LLAMA_DEFAULTS)
        heads = text["num_attention_heads"]
        rope = text.get("rope_parameters") or {}
        scaling = text.get("rope_scaling") or {}
        facts = {
            **text,
            "num_key_value_heads": text.get("num_key_value_heads", heads),
            "head_dim": text.get("head_dim") or text["hidden_size"] // heads,
            "rope_type": scaling.get(
                "type", scaling.get("rope_type", rope.get("rope_type", "default"))
            ),
        }
        self._demand(
            "text_config",
            facts,
            hidden_act="silu",
            attention_bias=False,
            mlp_bias=False,
            num_key_value_heads=heads,
            head_dim=text["hidden_size"] // heads,
            rope_type="default",
        )
        vocab = text["vocab_size"]
        ids = _llama_ids(self.folder)
        for name, id_ in ids.items():
            if id_ >= vocab:
                self.failures.append(f"the tokenizer's {name} is {id_}, the vocabulary has {vocab}")
        return LlamaConfig(
            width=text["hidden_size"],
            heads=heads,
            mlp=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            vocab=vocab,
            norm_eps=text["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", text["rope_theta"]),
            max_positions=text["max_position_embeddings"],
            dropout=text["attention_dropout"],
            **ids,
        )

    def _section(self, name: str, defaults: dict[str, Any]) -> dict[str, Any]:
        return {**defaults, **(self.config.get(name) or {})}

    def _demand(self, section: str, facts: dict[str, Any], **wanted: Any) -> None:
        for key, value in wanted.items():
            if facts[key] != value:
                self.failures.append(f"{section}.{key} is {facts[key]!r}; supported: {value!r}")


def _llama_ids(folder: Path) -> dict[str, Any]:
    """Ids of bos, eos and pad as the tokenizer has them.

    The text_config of the released folders says 0, 1 and -1, which is LLaMA's first port and wrong
    here. Where the tokenizer's files tell nothing, LlamaConfig's defaults stand: the released ids.
    """
    files = {
        name: read_json(folder / name) if (folder / name).is_file() else {}
        for name in TOKENIZER_FILES
        if name.endswith(".json")
    }
    known = dict(SENTENCEPIECE_IDS)
    known |= {
        token["content"]: token["id"] for token in files["tokenizer.json"].get("added_tokens", [])
    }
    settings = files["tokenizer_config.json"]
    for id_, token in settings.get("added_tokens_decoder", {}).items():
        known[token["content"]] = int(id_)
    known |= files["added_tokens.json"]
    ids = {}
    for name in ("bos", "eos", "pad"):
        token = settings.get(f"{name}_token") or files["special_tokens_map.json"].get(
            f"{name}_token"
        )
        content = str(token.get("content") if isinstance(token, dict) else token)
        if content in known:
            ids[f"{name}_id"] = known[content]
    return ids


def _unlike(found: Variant, wanted: Variant) -> list[str]:
    """Where the sizes of two variants differ; vocabularies, eps and ids are a folder's own."""
    sizes = "image_size patch_size width layers heads head_width mlp queries encoder_layers".split()
    sizes += ["decoder_layers", "kind"]
    return [
        f"{tower}.{field}: expected {theirs}, found {ours}"
        for tower in ("vision", "qformer", "llm")
        for field in sizes
        if (theirs := getattr(getattr(wanted, tower), field, None))
        != (ours := getattr(getattr(found, tower), field, None))
        and (field == "kind" or None not in (theirs, ours))
    ]
