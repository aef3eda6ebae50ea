"""Joins the sources of an original LLaVA to a whole model.

    llava-v1.5-7b/         + folder of CLIP                               the whole but the tower
    LLaVA-7b-delta-v1-1/   + folder of CLIP + folder of LLaMA             a difference to LLaMA
    mm_projector.bin       + folder of CLIP + the language model's folder the projector alone

All three become tensors under the original's names (`llava_names.py`), which one plan converts. A
delta is added to its base (`token_rows.py`), and so are the rows of new tokens.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_instructblip import checkpoint
from jax_instructblip.conversion import llava_config
from jax_instructblip.conversion.clip_folder import FILES, PREFIX, ClipFolder, open_clip
from jax_instructblip.conversion.engine import Plan, make_plan
from jax_instructblip.conversion.families import family_of, with_own_head
from jax_instructblip.conversion.hf_config import (
    check_preprocessor,
    check_variant,
    control_tokens,
    quantisation_problems,
    read_json,
    tokenizer_ids,
)
from jax_instructblip.conversion.hf_folder import SIDE_FILES, check_sizes
from jax_instructblip.conversion.input_formats import usual_input_format
from jax_instructblip.conversion.llava_names import NORM, STORED_TOWER, llava_entries
from jax_instructblip.conversion.llava_sources import (
    BIN,
    LlavaSource,
    add_base,
    open_projector,
    open_whole,
)
from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.conversion.tokenizer_settings import complete_settings
from jax_instructblip.conversion.weight_files import describe_files, has_weights
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.files import require_file
from jax_instructblip.models.variants import LlamaConfig, ProjectorConfig, Variant
from jax_instructblip.models.vlm import param_shapes

# Below this mean size of the last norm's scales, weights are differences. AdamW moves a scale by
# about its rate in a step: by 0.15 in LLaVA's longest training (2e-5, cosine, 15,000 steps), if all
# steps have one direction. Differences in half precision to scales around 0.5, 1 and 1.8 that
# moved by 0.001 to 0.05 had means of 0.001 to 0.04, whole weights 0.5 to 1.8.
DELTA_BELOW = 0.2


class LlavaOriginal(NamedTuple):
    """A checked model of original LLaVA; no weight is read yet.

    Attributes:
      variant: the sizes of the model.
      source: facts about the folders, for our config.json.
      leaves: the parameters; iterating makes (path, array), one at a time.
      input_format: how prompts and images are put to the model.
      tokenizer: the folder that has the tokenizer.
      settings: the tokenizer_config.json that it needs; None if its own is complete.
    """

    variant: Variant
    source: dict[str, Any]
    leaves: Plan
    input_format: InputFormat
    tokenizer: Path
    settings: dict[str, Any] | None


def is_llava_source(path: Path) -> bool:
    """Tells whether a path is an original folder of LLaVA, or a file of a projector alone."""
    if path.suffix == ".bin" and not path.is_dir():
        return True
    config = path / "config.json"
    if config.is_file():
        return llava_config.is_original(read_json(config))
    return (path / BIN).is_file()


def read_llava(
    path: Path,
    variant: str | Variant | None = None,
    *,
    vision: Path | None = None,
    llm: Path | None = None,
    base: Path | None = None,
) -> LlavaOriginal:
    """Returns the model that an original folder or file makes; checks all but the weights' values.

    Args:
      path: an original folder, of whole weights or of a delta, or a file or folder of a projector.
      variant: the sizes that the model must have, or the name of a released model.
      vision: the folder of its CLIP; required.
      llm: of a projector, the Hugging Face folder of its language model.
      base: of a delta, the Hugging Face folder of the LLaMA that it is added to.

    Raises:
      ConversionError: with every reason why these are no whole model.
    """
    path, config = _read_config(path)
    if later := llava_config.later_version(config):
        raise ConversionError(f"{path} holds a model that is not supported", later)
    alone = path.is_file()
    source = None if alone else open_whole(path, config)
    delta = source is not None and _is_delta(source.tensors)
    wrong = _problems(path, config, delta, vision=vision, llm=llm, base=base)
    if wrong:
        raise ConversionError(f"{path} with these folders makes no whole model", wrong)
    assert vision is not None  # `_problems` has told
    if source is None:
        assert llm is not None
        source = open_projector(path, config, llm)
    elif base is not None:
        source = add_base(source, base)
    return _join(source, vision, variant)


def _read_config(path: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the folder, or the file of a projector alone, and its config.json or {}."""
    if not path.is_dir():
        require_file(path)
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    config = config if llava_config.is_original(config) else {}
    if path.is_dir() and not has_weights(path) and (path / BIN).is_file():
        path = path / BIN
    return path, config


def _is_delta(tensors: dict[str, Any]) -> bool:
    """Tells whether the weights are differences to another model, by the scales of the norm."""
    norm = tensors.get(NORM)
    return norm is not None and np.abs(norm.read().astype(np.float32)).mean() < DELTA_BELOW


def _problems(path: Path, config: dict[str, Any], delta: bool, **given: Path | None) -> list[str]:
    """Returns a line for each folder that is missing or too much."""
    wrong = []
    if given["vision"] is None:
        name = config.get("mm_vision_tower") or "openai/clip-vit-large-patch14"
        wrong.append(
            f"the image tower {name} is not in it: give its folder ({', '.join(FILES)}): --vision"
        )
    if path.is_file():
        if given["llm"] is None:
            wrong.append(
                "it holds the projector alone: give the language model's Hugging Face folder: --llm"
            )
        if given["base"] is not None:
            wrong.append(f"{given['base']} was given as base: the projector is no delta")
        return wrong
    if given["llm"] is not None:
        wrong.append(f"{given['llm']} was given as language model, but the folder has its own")
    if delta and given["base"] is None:
        wrong.append(
            f"it holds a delta ({NORM} is near 0), the differences to LLaMA: give the Hugging Face "
            "folder of that LLaMA: --base"
        )
    elif not delta and given["base"] is not None:
        wrong.append(
            f"{given['base']} was given as base, but the folder holds no delta ({NORM} is not near "
            "0): leave it out"
        )
    return wrong


def _join(source: LlavaSource, vision: Path, variant: str | Variant | None) -> LlavaOriginal:
    """Returns the model of a source's tensors and those of CLIP's folder."""
    stored = any(name.startswith(STORED_TOWER) for name in source.tensors)
    clip = open_clip(vision, weights=not stored)
    settings = complete_settings(source.tokenizer, source.added)
    described, image = _variant(source, clip, settings)
    if variant is not None:
        check_variant(source.path, described, variant)
    tensors = {**source.tensors, **clip.tensors}
    check_sizes(source.path, described, family_of(described), tensors)
    check_preprocessor(vision, described)
    plan = make_plan(
        llava_entries(described, STORED_TOWER if stored else PREFIX),
        tensors,
        checkpoint.flatten(param_shapes(described)),
        f"the tensors of {source.path} and {vision} do not fit their config.json",
    )
    plan = dataclasses.replace(plan, dropped={**plan.dropped, **clip.dropped, **source.dropped})
    facts = {
        "kind": "llava",
        "original_config": source.config,
        "dtypes": dict(Counter(tensor.dtype.name for tensor in tensors.values())),
        "tied_head": False,
        "dropped": plan.dropped,
        **source.facts,
        "vision_tower": {"folder": str(vision), "files": describe_files(clip.tensors)},
        "stored_tower": stored,
        "image_aspect_ratio": image["image_aspect_ratio"],
        "mm_use_im_start_end": image["start_end"],
    }
    # Not a fact of the whole folder: the image's share of it does not say how it is padded.
    for place, folder, name in (
        (facts, source.tokenizer, SIDE_FILES[0]),
        (facts["vision_tower"], vision, SIDE_FILES[1]),
    ):
        if (folder / f"{name}.json").is_file():
            place[name] = read_json(folder / f"{name}.json")
    language = {"config": {"text_config": {"model_type": source.kind}}}
    asked = usual_input_format(described, source.tokenizer, facts | language)
    return LlavaOriginal(described, facts, plan, asked, source.tokenizer, settings)


def _variant(
    source: LlavaSource, clip: ClipFolder, settings: dict[str, Any] | None
) -> tuple[Variant, dict[str, Any]]:
    """Returns the sizes of the joined model, and the fields of `llava_config.IMAGE`.

    Raises:
      ConversionError: config.json has values that cannot be held; all are listed.
    """
    fields, failures = llava_config.language_section(source.kind).read(source.config)
    image, wrong = llava_config.IMAGE.read(source.config)
    failures += wrong + quantisation_problems(source.config)
    known = {*control_tokens(source.tokenizer), *source.added.values()}
    lacking = [mark for mark in llava_config.MARKS if mark not in known]
    if image.get("start_end") and lacking:
        failures.append(
            f"mm_use_im_start_end is True, but the tokenizer in {source.tokenizer} has no "
            f"{' and '.join(lacking)}: put the files of the trained model's own tokenizer there "
            "(added_tokens.json among them), or say False if it was trained without them"
        )
    ids = tokenizer_ids(source.tokenizer, failures, "llava", settings)
    title = f"{source.path} with {clip.folder} cannot be held"
    if failures:
        raise ConversionError(title, failures)
    failures = llava_config.tower_problems(image, clip.config.width, clip.config.image_size)
    failures += [
        f"the tokenizer's {name} is {id_}, the vocabulary has {fields['vocab']}"
        for name, id_ in ids.items()
        if id_ >= fields["vocab"]
    ]
    sizes: dict[str, Any] = fields | ids
    llm: Any = with_own_head(LlamaConfig(**sizes), source.has_head)
    bridge = ProjectorConfig(clip.config.width, llm.width, image["layers"])
    try:
        described = Variant("llava", clip.config, bridge, llm)
    except ValueError as error:
        raise ConversionError(title, [*failures, str(error)]) from error
    if failures:
        raise ConversionError(title, failures)
    return described, image
