"""Exports a checkpoint of this package as a Hugging Face folder that transformers loads, bit-equal.

`assembly.py` makes the tensors; here are the small files beside them.
"""

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_instructblip import fields
from jax_instructblip.atomic import atomic_folder, check_room, refuse_existing
from jax_instructblip.conversion import hf_folder
from jax_instructblip.conversion.assembly import make_groups, write_tensors
from jax_instructblip.conversion.families import Family, family_of
from jax_instructblip.conversion.hf_config import preprocessor, variant_of
from jax_instructblip.conversion.input_formats import changed_image_settings, lost_input_format
from jax_instructblip.conversion.safetensors import SHARD_BYTES, SHARD_SIZE
from jax_instructblip.conversion.stored_model import (
    StoredModel,
    read_stored_model,
    tokenizers,
)
from jax_instructblip.files import TOKENIZER_LIMIT, read_json
from jax_instructblip.models.variants import QFormerConfig

PROCESSORS = {
    "instructblip": "InstructBlipProcessor",
    "blip2": "Blip2Processor",
    "llava": "LlavaProcessor",
}
IMAGE_TOKEN = "<image>"
LACKING_IMAGE = (
    "by tokenizer.add_tokens(['<image>'], special_tokens=True); "
    "model.resize_token_embeddings(len(tokenizer)); "
    "model.config.image_token_id = len(tokenizer) - 1"
)
QFORMER_LIMIT = 128  # tokens of an instruction, as released


def export_hf(
    model: str | Path | StoredModel,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """Writes `out`, a Hugging Face folder of a generative model or a first stage; returns notes.

    The notes are sentences for the user about what the format cannot hold. Dtypes are kept.

    Args:
      model: a checkpoint folder of this package, or a `StoredModel`.
      out: the folder to make; it must not exist, and appears when it is complete.
      shard_bytes: largest size of a weight file.
      progress: is called with the size in bytes of each tensor written.

    Raises:
      ValueError: the format cannot hold this model.
      OSError: `out` exists, or the disk has too little room.
    """
    if not isinstance(model, StoredModel):
        model = read_stored_model(Path(model))
    left_out = []
    if model.variant.llm is None and model.variant.qformer.caption_head:
        changed = model.variant.replace(**{"qformer.caption_head": False})
        model = dataclasses.replace(model, variant=changed)
        left_out = ["the format has no caption head and no temperature: both are left out"]
    fields.check({"shard_bytes": shard_bytes}, {"shard_bytes": SHARD_SIZE})
    family = family_of(model.variant)
    if family.reads_instruction != model.variant.reads_instruction:
        has = "with" if model.variant.reads_instruction else "without"
        raise ValueError(
            f"{model.title} holds a Q-Former {has} the instruction branch: {family.architecture} "
            "cannot hold that; `jax-instructblip merge` writes a checkpoint of this package"
        )
    family.config(model.variant)  # refuses sizes that the format has no keys for
    refuse_existing(out)
    check_room(Path(out), model.nbytes)
    tied = bool(model.facts.get("tied_head")) and _head_is_tied(model)
    entries = family.rules(model.variant)
    groups = make_groups(entries, model.manifest, model.title, leave_out_head=tied)
    prefixes: Mapping[str, str] = model.facts.get("prefixes", {})
    groups = [dataclasses.replace(each, keys=_spelled(each.keys, prefixes)) for each in groups]
    with atomic_folder(out) as temporary:
        write_tensors(model, groups, temporary, shard_bytes, progress)
        notes = _write_sides(model, family, temporary, tied)
    return left_out + notes


def _spelled(names: Iterable[str], prefixes: Mapping[str, str]) -> list[str]:
    """Returns names of the tables as the folder had them from which the model was converted."""
    spelled = []
    for name in names:
        ours = next((each for each in prefixes if name.startswith(each)), "")
        spelled.append(prefixes.get(ours, "") + name.removeprefix(ours))
    return spelled


def _head_is_tied(model: StoredModel) -> bool:
    """Tells whether head and token embedding have the same numbers; OPT has one array for both."""
    if "llm/head/kernel" not in model.manifest:
        return True
    both = dict(model.read(["llm/embed/embedding", "llm/head/kernel"]))
    embed, head = both["llm/embed/embedding"], both["llm/head/kernel"]
    return embed.dtype == head.dtype and np.array_equal(
        embed.view(f"u{embed.itemsize}"), head.view(f"u{head.itemsize}").T
    )


def _write_sides(model: StoredModel, family: Family, out: Path, tied: bool) -> list[str]:
    """Writes config, tokenizers and other small files; returns notes on what the format lacks."""
    variant, facts = model.variant, model.facts
    notes = []
    for name in tokenizers(variant):
        files = sorted((model.folder / name).glob("*"))
        if not files:
            notes.append(f"the checkpoint has no {name}: the folder cannot be prompted as it is")
        target = out if name == tokenizers(variant)[0] else out / name
        target.mkdir(exist_ok=True)
        for path in files:
            shutil.copyfile(path, target / path.name)
    if "config" in facts:
        updated = _updated(facts["config"], model, family)
        config = {"architectures": [family.architecture], **updated}
        if facts.get("tied_head") and not tied:
            config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    else:
        config = family.config(variant)
        config["dtype"] = _main_dtype(model.manifest)
        if variant.llm is not None:
            image = _image_token(model.folder)
            if image is not None or variant.kind != "llava":  # its config.json allows no null
                config["image_token_index"] = image
            if image is None:
                notes.append(
                    "the tokenizer has no <image> token: transformers needs one, "
                    + (LACKING_IMAGE if variant.kind == "llava" else "and image_token_index")
                )
    notes += _losses(model, family, config)
    # Only LLaVA's format has other ways to prepare images; what is lost is said.
    crop = model.input_format.image_crop if variant.kind == "llava" else ""
    sides = {"preprocessor_config": preprocessor(variant, crop)}
    sides |= {name: facts[name] for name in hf_folder.SIDE_FILES if name in facts}
    sides |= changed_image_settings(variant, model.input_format, sides)
    if variant.kind in PROCESSORS:  # transformers puts that many image tokens before a prompt
        usual: dict[str, Any] = {"processor_class": PROCESSORS[variant.kind]}
        if isinstance(variant.bridge, QFormerConfig):
            usual["num_query_tokens"] = variant.bridge.queries
        else:
            usual |= {
                "patch_size": variant.vision.patch_size,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,  # CLS
                "image_token": IMAGE_TOKEN,
            }
        sides["processor_config"] = usual | sides.get("processor_config", {})
    notes += lost_input_format(variant, model.input_format, out, {"config": config, **sides})
    for name, document in {"config": config, **sides}.items():
        (out / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    return notes


def _updated(config: Mapping[str, Any], model: StoredModel, family: Family) -> dict[str, Any]:
    """Returns the config.json from which the model was converted, with the sizes it has now.

    Sizes and rates can change between conversion and export, by tuning for example.
    """
    before = family.config(variant_of(model.folder / "tokenizer", config))
    result = json.loads(json.dumps(config))
    for name, now in family.config(model.variant).items():
        if isinstance(now, dict):
            changed = {key: value for key, value in now.items() if before[name].get(key) != value}
            result[name] = {**(result.get(name) or {}), **changed}
        elif before[name] != now:
            result[name] = now
    return result


def _losses(model: StoredModel, family: Family, config: Mapping[str, Any]) -> list[str]:
    """Returns sentences about what the format cannot hold, or transformers does in another way."""
    vision, bridge, notes = model.variant.vision, model.variant.bridge, []
    if isinstance(bridge, QFormerConfig) and bridge.image_norm_eps != vision.norm_eps:
        notes.append(
            f"the image norm's eps is {bridge.image_norm_eps:g}; {family.architecture} takes "
            f"the vision tower's, {vision.norm_eps:g}: outputs differ slightly there"
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
    return next((token["id"] for token in tokens if token["content"] == IMAGE_TOKEN), None)
