"""Exports a LLaVA in the original's layout: a whole folder, or the projector alone.

config.json, model*.safetensors, tokenizer    the language model and the projector
vision_tower/                                 CLIP's image tower, which the original keeps apart

config.json, mm_projector.bin                 the projector alone, with the token embedding if
                                              `<im_start>` and `<im_end>` are in it
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax_instructblip import fields
from jax_instructblip.atomic import atomic_folder, check_room, refuse_existing
from jax_instructblip.conversion import llava_config
from jax_instructblip.conversion.assembly import assemble, make_groups, write_tensors
from jax_instructblip.conversion.clip_folder import ALONE, PREFIX
from jax_instructblip.conversion.families import language_type
from jax_instructblip.conversion.hf_config import preprocessor
from jax_instructblip.conversion.hf_folder import SIDE_FILES
from jax_instructblip.conversion.llava_names import EMBED, STORED_TOWER, llava_entries, part
from jax_instructblip.conversion.llava_sources import BIN
from jax_instructblip.conversion.safetensors import SHARD_BYTES, SHARD_SIZE
from jax_instructblip.conversion.sections import CLIP_VIT
from jax_instructblip.conversion.stored_model import StoredModel, tokenizers
from jax_instructblip.conversion.torch_files import save_tensors
from jax_instructblip.models.variants import LlamaConfig

TOWER = "vision_tower"  # the folder of CLIP beside the weights

Progress = Callable[[int], Any]


def export_original(
    model: StoredModel,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[str]:
    """Writes `out`, a folder in the layout of original LLaVA; returns notes.

    The notes are sentences for the user, such as where the image tower is. Dtypes are kept.

    Args:
      model: a LLaVA with a language model for which the original has a class.
      out: the folder to make; it must not exist, and appears when it is complete.
      shard_bytes: largest size of a weight file.
      progress: is called with the size in bytes of each tensor written.

    Raises:
      ValueError: the layout cannot hold this model.
      OSError: `out` exists, or the disk has too little room.
    """
    fields.check({"shard_bytes": shard_bytes}, {"shard_bytes": SHARD_SIZE})
    _check_kind(model)
    llm: Any = model.variant.llm
    llava_config.check_language(llm)
    config = _config(model)
    stored = bool(model.facts.get("stored_tower"))
    entries = llava_entries(model.variant, STORED_TOWER)
    rules = [*part(entries, "llm"), *part(entries, "projector")]
    rules += part(entries, "vision") if stored else []
    groups = make_groups(rules, model.manifest, model.title)
    tower = part(llava_entries(model.variant, PREFIX), "vision")
    refuse_existing(out)
    check_room(out, model.nbytes * (1 + stored))
    with atomic_folder(out) as temporary:
        write_tensors(model, groups, temporary, shard_bytes, progress)
        (temporary / TOWER).mkdir()
        tower_groups = make_groups(tower, model.manifest, model.title)
        write_tensors(model, tower_groups, temporary / TOWER, shard_bytes, progress)
        _write_json(temporary / TOWER, _tower_documents(model))
        sides = {name: model.facts[name] for name in SIDE_FILES[:1] if name in model.facts}
        _write_json(temporary, {"config": config, **sides})
        notes = _copy_tokenizer(model, temporary)
    name = config.get("mm_vision_tower")
    where = f"its mm_vision_tower is {name}" if name else "name that folder as mm_vision_tower"
    return [*notes, f"the image tower is in {TOWER}/ of the folder; {where}"]


def export_projector(
    model: StoredModel,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[str]:
    """Writes `out`, a folder with the projector of a LLaVA and a config.json; returns notes.

    The arguments and errors are those of `export_original`, except that there is always one file of
    weights, whatever `shard_bytes` is. Needs the extra `torch`.
    """
    del shard_bytes
    _check_kind(model)
    config = _config(model)
    entries = part(llava_entries(model.variant, PREFIX), "projector")
    if llava_config.IMAGE.read(config)[0]["start_end"]:
        rules = part(llava_entries(model.variant, PREFIX), "llm")
        entries += [each for each in rules if each.source == EMBED]
    groups = make_groups(entries, model.manifest, model.title)
    refuse_existing(out)
    size = sum(group.nbytes for group in groups)
    check_room(out, size)
    with atomic_folder(out) as temporary:
        save_tensors(temporary / BIN, dict(assemble(model, groups)))
        if progress is not None:
            progress(size)
        _write_json(temporary, {"config": config})
    return [f"it lacks the language model and the image tower: converting {BIN} takes both"]


def _config(model: StoredModel) -> dict[str, Any]:
    """Returns the config.json: that of the source with present sizes, or a new one."""
    variant, facts = model.variant, model.facts
    assert isinstance(variant.llm, LlamaConfig)
    before = facts.get("original_config")
    names = (before or {}).get("architectures") or [""]
    kind = llava_config.LANGUAGES.get(names[0]) or language_type(variant.llm)
    new = llava_config.make_config(variant, kind)
    asked = _asked(model)
    if before is None:
        more = {"mm_use_im_patch_token": False, "tokenizer_padding_side": "right"}
        return {**new, **asked, **more}
    # Sizes and rates can change between conversion and export, by tuning for example.
    section = llava_config.language_section(kind)
    llm = dataclasses.replace(variant.llm, **section.read(before)[0])
    old, now = section.write(llm), section.write(variant.llm)
    config = {**before, **{key: value for key, value in now.items() if old[key] != value}}
    size, width = variant.vision.image_size, variant.vision.width
    image = llava_config.IMAGE.read(before)[0]
    if llava_config.tower_problems(image, width, size):
        config["mm_vision_tower"] = new["mm_vision_tower"]
    stated = dict(zip(asked, (image["start_end"], image["image_aspect_ratio"]), strict=True))
    return config | {key: value for key, value in asked.items() if stated[key] != value}


def _asked(model: StoredModel) -> dict[str, Any]:
    """Returns the keys about tokens around an image and about how it becomes a square.

    Raises:
      ValueError: the layout has no value for how images become squares.
    """
    crop = model.input_format.image_crop
    ratio = next((name for name, ours in llava_config.RATIOS.items() if ours == crop), None)
    if ratio is None:
        raise ValueError(
            f"{model.title} takes images by the crop {crop!r}; the layout of original LLaVA holds "
            f"{' and '.join(llava_config.RATIOS.values())} alone"
        )
    marks = model.input_format.image_marks == llava_config.MARKS
    return {"mm_use_im_start_end": marks, "image_aspect_ratio": ratio}


def _check_kind(model: StoredModel) -> None:
    if model.variant.kind != "llava":
        raise ValueError(
            f"{model.title} is a model of kind {model.variant.kind}: the layout of original LLaVA "
            "holds one of kind llava alone"
        )


def _tower_documents(model: StoredModel) -> dict[str, Any]:
    """Returns config.json and preprocessor_config.json of the image tower's folder."""
    config = {"architectures": ["CLIPVisionModel"], "model_type": ALONE}
    config |= CLIP_VIT.write(model.variant.vision)
    images = model.facts.get("vision_tower", {}).get(SIDE_FILES[1], {})
    return {"config": config, SIDE_FILES[1]: images | preprocessor(model.variant)}


def _write_json(folder: Path, documents: Mapping[str, Any]) -> None:
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")


def _copy_tokenizer(model: StoredModel, out: Path) -> list[str]:
    """Copies the tokenizer's files to `out`; returns a note if there are none."""
    (name,) = tokenizers(model.variant)
    files = sorted((model.folder / name).glob("*"))
    for path in files:
        shutil.copyfile(path, out / path.name)
    return [] if files else [f"the checkpoint has no {name}: the folder cannot be prompted"]
