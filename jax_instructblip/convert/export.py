"""A checkpoint of ours -> a Hugging Face folder that stock transformers loads, bit-equal.

The tables of the conversion run backward: each source tensor is put together from the parts that
its rules took, and a part that fills nothing (the ViT's key bias) is written as zeros.
"""

import dataclasses
import itertools
import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_instructblip.convert import hf, transforms
from jax_instructblip.convert.engine import Drop, Rule, Zeros
from jax_instructblip.convert.hf_config import ARCHITECTURE, MODEL_TYPE, variant_of
from jax_instructblip.convert.safetensors import Writer
from jax_instructblip.convert.stored_model import (
    TOKENIZERS,
    StoredModel,
    check_room,
    read_stored_model,
)
from jax_instructblip.files import TOKENIZER_LIMIT, read_json
from jax_instructblip.folders import atomic_folder, refuse_existing
from jax_instructblip.models.variants import LlamaConfig, T5Config, Variant

SHARD_BYTES = 5_000_000_000
QFORMER_LIMIT = 128  # tokens of an instruction, as released
DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("bfloat16", "float16", "float32")
}


@dataclasses.dataclass(frozen=True)
class _Group:
    """The tensors of one source name (all its layers) and the entries that describe their parts."""

    keys: list[str]
    entries: list[Rule | Zeros]  # in the order of the parts
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def rules(self) -> list[Rule]:
        return [entry for entry in self.entries if isinstance(entry, Rule)]

    def make(self, layer: int, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """The tensor of one layer: a permuted copy of the leaf, or its parts one after another."""
        made = np.zeros(self.shape, self.dtype)
        rows = self.shape[0] // len(self.entries) if self.shape else 0
        for part, entry in enumerate(self.entries):
            if isinstance(entry, Rule):
                leaf = leaves[entry.target]
                leaf = leaf if entry.layers is None else leaf[layer]
                place = made[part * rows : (part + 1) * rows] if len(self.entries) > 1 else made
                transforms.copy(place, entry.transform.backward(leaf))
        return made


def export_hf(
    model: str | Path | StoredModel,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """Writes `out`, a Hugging Face InstructBLIP folder; returns what is worth knowing of it.

    `model` is a checkpoint folder of ours or what `stored_model.py` makes of a run; its dtypes are
    kept. `progress` is called with the bytes of each tensor written. `out` appears when all is
    written, and must not exist.
    """
    if not isinstance(model, StoredModel):
        model = read_stored_model(Path(model))
    if not model.variant.qformer.instruction_aware:
        raise ValueError(
            f"{model.title} holds a Q-Former without the instruction branch: {ARCHITECTURE} cannot "
            "hold that; `jax-instructblip merge` writes a checkpoint of this package"
        )
    refuse_existing(out)
    check_room(Path(out), model.nbytes)
    tied = bool(model.facts.get("tied_head")) and _head_is_tied(model)
    groups = _groups(model.variant, model.manifest, leave_out_head=tied)
    specs = {key: (group.dtype, group.shape) for group in groups for key in group.keys}
    with atomic_folder(out) as temporary:
        writer = Writer(temporary, specs, shard_bytes)
        for key, tensor in _tensors(model, groups):
            writer.write(key, tensor)
            if progress is not None:
                progress(tensor.nbytes)
        writer.close()
        notes = _write_sides(model, temporary, tied)
    return notes


def _groups(variant: Variant, manifest: Mapping[str, Any], *, leave_out_head: bool) -> list[_Group]:
    by_source: dict[str, list[Rule | Zeros]] = defaultdict(list)
    for entry in hf.rules(variant):
        if isinstance(entry, Drop):
            continue
        if leave_out_head and isinstance(entry, Rule) and entry.target == "llm/head/kernel":
            continue
        by_source[f"{entry.source} {entry.layers}"].append(entry)
    groups = []
    for entries in by_source.values():
        entries.sort(key=lambda entry: entry.part)
        rule = next(entry for entry in entries if isinstance(entry, Rule))
        leaf = manifest[rule.target]
        inner = tuple(leaf["shape"]) if rule.layers is None else tuple(leaf["shape"])[1:]
        first, *rest = rule.transform.source_shape(inner) or (1,)
        shape = (first * len(entries), *rest) if inner else ()
        dtypes = {manifest[e.target]["dtype"] for e in entries if isinstance(e, Rule)}
        if len(dtypes) > 1:
            raise ValueError(
                f"{rule.source} is made of leaves of different dtypes: {sorted(dtypes)}"
            )
        groups.append(_Group(rule.keys, entries, DTYPES[dtypes.pop()], shape))
    return groups


def _tensors(model: StoredModel, groups: list[_Group]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the source, in the order of the groups; peak memory is one group's leaves."""
    wanted = [rule.target for group in groups for rule in group.rules]
    leaves = model.read(wanted)
    for group in groups:
        held = dict(itertools.islice(leaves, len(group.rules)))
        for layer, key in enumerate(group.keys):
            yield key, group.make(layer, held)
        del held  # before the next group is read


def _head_is_tied(model: StoredModel) -> bool:
    """Whether head and embedding still hold the same numbers."""
    both = dict(model.read(["llm/embed/embedding", "llm/head/kernel"]))
    embed, head = both["llm/embed/embedding"], both["llm/head/kernel"]
    return embed.dtype == head.dtype and np.array_equal(
        embed.view(f"u{embed.itemsize}"), head.view(f"u{head.itemsize}").T
    )


def _write_sides(model: StoredModel, out: Path, tied: bool) -> list[str]:
    """Writes config, tokenizers and side files; returns notes on what the format cannot say."""
    variant, facts = model.variant, model.facts
    notes = []
    for name in TOKENIZERS:
        files = sorted((model.folder / name).glob("*"))
        if not files:
            notes.append(f"the checkpoint has no {name}: the folder cannot be prompted as it is")
        target = out if name == "tokenizer" else out / name
        target.mkdir(exist_ok=True)
        for path in files:
            shutil.copyfile(path, target / path.name)
    made = _config(variant, _main_dtype(model.manifest), _image_token(model.folder))
    if "config" in facts:
        config = {"architectures": [ARCHITECTURE], **_updated(facts["config"], model, made)}
        if facts.get("tied_head") and not tied:
            config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    else:
        config = made
        if config["image_token_index"] is None:
            notes.append(
                "the tokenizer has no <image> token: transformers needs one, and image_token_index"
            )
    notes += _losses(model, config)
    sides = {"preprocessor_config": _preprocessor(variant)}
    sides |= {name: facts[name] for name in hf.SIDE_FILES if name in facts}
    for name, document in {"config": config, **sides}.items():
        (out / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    return notes


def _updated(config: Mapping[str, Any], model: StoredModel, made: Mapping[str, Any]) -> dict:
    """The `config` of long ago with what the model's sizes and rates say otherwise by now."""
    then = variant_of(model.folder / "tokenizer", dict(config))
    before = _config(then, made["dtype"], made["image_token_index"])
    result = json.loads(json.dumps(config))
    for section, fields in made.items():
        if isinstance(fields, dict):
            changed = {k: v for k, v in fields.items() if before[section].get(k) != v}
            result[section] = {**(result.get(section) or {}), **changed}
        elif before[section] != fields:
            result[section] = fields
    return result


def _losses(model: StoredModel, config: Mapping[str, Any]) -> list[str]:
    """What the model has and the format cannot say, or what transformers does otherwise."""
    variant, notes = model.variant, []
    if variant.qformer.image_norm_eps != variant.vision.norm_eps:
        notes.append(
            f"the image norm's eps is {variant.qformer.image_norm_eps:g}; {ARCHITECTURE} takes "
            f"the vision tower's, {variant.vision.norm_eps:g}: outputs differ slightly there"
        )
    stated = config.get("dtype") or config.get("torch_dtype")
    widths = {entry["dtype"] for entry in model.manifest.values()}
    if "tuned" in model.facts and "float32" in widths and stated not in (None, "float32"):
        notes.append(
            f"tuned weights are float32, config.json says {stated}: transformers rounds them to "
            "that unless it is told dtype=float32"
        )
    limit = model.limits.get("qformer_limit", QFORMER_LIMIT)
    if limit < QFORMER_LIMIT:
        notes.append(
            f"the Q-Former was tuned on the last {limit} tokens of an instruction; transformers "
            "gives it all of them"
        )
    return notes


def _main_dtype(manifest: Mapping[str, Any]) -> str:
    sizes: Counter[str] = Counter()
    for entry in manifest.values():
        sizes[entry["dtype"]] += math.prod(entry["shape"])
    return sizes.most_common(1)[0][0]


def _image_token(folder: Path) -> int | None:
    path = folder / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        return None
    tokens = read_json(path, dict, limit=TOKENIZER_LIMIT).get("added_tokens", [])
    return next((token["id"] for token in tokens if token["content"] == "<image>"), None)


def _preprocessor(variant: Variant) -> dict[str, Any]:
    size = variant.vision.image_size
    return {
        "image_processor_type": "BlipImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,  # PIL's bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _config(variant: Variant, dtype: str, image_token: int | None) -> dict[str, Any]:
    """The config.json of a checkpoint that never had one: `variant_of` reads the variant back."""
    eyes, former, llm = variant.vision, variant.qformer, variant.llm
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "image_token_index": image_token,
        "num_query_tokens": former.queries,
        "use_decoder_only_language_model": isinstance(llm, LlamaConfig),
        "vision_config": {
            "model_type": "instructblip_vision_model",
            "hidden_size": eyes.width,
            "intermediate_size": eyes.mlp,
            "num_hidden_layers": eyes.layers,
            "num_attention_heads": eyes.heads,
            "image_size": eyes.image_size,
            "patch_size": eyes.patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": eyes.norm_eps,
            "qkv_bias": True,
        },
        "qformer_config": {
            "model_type": "instructblip_qformer",
            "vocab_size": former.vocab,
            "hidden_size": former.width,
            "num_hidden_layers": former.layers,
            "num_attention_heads": former.heads,
            "intermediate_size": former.mlp,
            "hidden_act": "gelu",
            "hidden_dropout_prob": former.dropout,
            "attention_probs_dropout_prob": former.dropout,
            "max_position_embeddings": former.max_positions,
            "layer_norm_eps": former.norm_eps,
            "cross_attention_frequency": 2,
            "encoder_hidden_size": former.vision_width,
        },
        "text_config": _t5_config(llm) if isinstance(llm, T5Config) else _llama_config(llm),
    }


def _t5_config(llm: T5Config) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "d_model": llm.width,
        "d_kv": llm.head_width,
        "d_ff": llm.mlp,
        "num_layers": llm.encoder_layers,
        "num_decoder_layers": llm.decoder_layers,
        "num_heads": llm.heads,
        "vocab_size": llm.vocab,
        "relative_attention_num_buckets": llm.relative_buckets,
        "relative_attention_max_distance": llm.relative_max_distance,
        "layer_norm_epsilon": llm.norm_eps,
        "feed_forward_proj": f"gated-{llm.activation.removesuffix('_new')}",
        "dense_act_fn": llm.activation,
        "scale_decoder_outputs": llm.scale_decoder_outputs,
        "tie_word_embeddings": llm.scale_decoder_outputs,  # what older versions scale by
        "dropout_rate": llm.dropout,
        "pad_token_id": llm.pad_id,
        "eos_token_id": llm.eos_id,
        "decoder_start_token_id": llm.decoder_start_id,
    }


def _llama_config(llm: LlamaConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.heads,
        "head_dim": llm.head_width,
        "vocab_size": llm.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": llm.norm_eps,
        "rope_theta": llm.rope_theta,
        "max_position_embeddings": llm.max_positions,
        "attention_dropout": llm.dropout,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": llm.bos_id,
        "eos_token_id": llm.eos_id,
        "pad_token_id": llm.pad_id,
    }
