"""The config.json of original LLaVA: LLaMA's keys, and beside them those of the image.

    "architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 4096, ...          LLaMA's
    "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_projector_type": ...  of the image

The sizes of the image tower are not in it: they are in the tower's own folder. Folders of LLaVA v1
and v1.5 are read; those of later versions are recognised, to be refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_instructblip.conversion.config_keys import (
    FLAG_OR_NULL,
    SIZE_OR_NULL,
    Fixed,
    Pair,
    Section,
    Values,
    one_of,
    text,
)
from jax_instructblip.conversion.llama_sections import SECTIONS
from jax_instructblip.models.variants import LlamaConfig, ProjectorConfig, Variant

LANGUAGES = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral"}
PROJECTORS = {"linear": 1, "mlp2x_gelu": 2}  # linear layers
RATIOS = {"square": "clip", "pad": "pad"}  # `image_aspect_ratio`, and the name in `images.CROPS`
MARKS = ("<im_start>", "<im_end>")  # the tokens around an image, with `mm_use_im_start_end`
# Pixels a side of the released image towers, by the last word of `mm_vision_tower`.
TOWERS = {"clip-vit-large-patch14": 224, "clip-vit-large-patch14-336": 336}
IMAGE_KEYS = ("mm_", "image_")  # beginnings of the keys that are not the language model's
_LATER = "LLaVA v1.6 and later cut an image into tiles, which no model of this package does"


def is_original(config: Mapping[str, Any]) -> bool:
    """Tells whether a config.json is of original LLaVA, of any version."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else ""
    named = isinstance(name, str) and name.startswith("Llava") and name.endswith("ForCausalLM")
    return named or "mm_vision_tower" in config or "mm_projector_type" in config


def later_version(config: Mapping[str, Any]) -> list[str]:
    """Returns the reasons why a config.json is of LLaVA v1.6 or later; [] if it is not."""
    found = []
    ratio = config.get("image_aspect_ratio")
    if isinstance(ratio, str) and "anyres" in ratio:
        found.append(f"image_aspect_ratio is {ratio!r:.60}: {_LATER}")
    if (merge := config.get("mm_patch_merge_type")) not in (None, "flat"):
        found.append(f"mm_patch_merge_type is {merge!r:.60}: {_LATER}")
    names = config.get("architectures")
    for name in [*(names if isinstance(names, list) else []), config.get("model_type")]:
        plain = str(name).lower().replace("_", "")
        if plain.startswith(("llavanext", "llavaqwen", "llavaonevision")):
            found.append(f"{name!r:.60} is of a later version: {_LATER}")
    return found


def _read_projector(values: Values) -> dict[str, Any]:
    kind = values.checked("mm_projector_type", one_of(*PROJECTORS), "linear")
    return {"layers": PROJECTORS[kind]}


def _write_projector(bridge: ProjectorConfig) -> dict[str, Any]:
    names = {layers: name for name, layers in PROJECTORS.items()}
    return {
        "mm_projector_type": names[bridge.layers],
        "mm_hidden_size": bridge.vision_width,
        "use_mm_proj": True,
    }


_RATIO = dataclasses.replace(one_of(*RATIOS), optional=True)
_NAME = dataclasses.replace(text(), optional=True)


def _read_facts(values: Values) -> dict[str, Any]:
    """Returns the fields that are no sizes, such as the tower's name and the image's ratio."""
    return {
        "vision_tower": values.checked("mm_vision_tower", _NAME) or "",
        "vision_width": values.checked("mm_hidden_size", SIZE_OR_NULL),
        "image_aspect_ratio": values.checked("image_aspect_ratio", _RATIO) or "square",
        "start_end": values.checked("mm_use_im_start_end", FLAG_OR_NULL) is True,
        "patch_token": values.checked("mm_use_im_patch_token", FLAG_OR_NULL) is not False,
    }


IMAGE = Section(
    "",
    (
        Pair(_read_projector, _write_projector, {"mm_projector_type": "linear"}),
        Fixed("mm_vision_select_layer", -2),
        Fixed("mm_vision_select_feature", "patch"),
        Pair(
            _read_facts,
            lambda bridge: {},
            dict.fromkeys(
                ("mm_vision_tower", "mm_hidden_size", "image_aspect_ratio")
                + ("mm_use_im_start_end", "mm_use_im_patch_token")
            ),
        ),
    ),
)


def language_section(kind: str) -> Section:
    """Returns `SECTIONS[kind]` for a config.json of original LLaVA, which has the keys at its top.

    `kind` is the language model, a key of `llama_sections.SECTIONS`.
    """
    return dataclasses.replace(SECTIONS[kind], name="")


def tower_problems(image: Mapping[str, Any], width: int, size: int) -> list[str]:
    """Returns complaints about an image tower of another kind than config.json names, or [].

    `image` are the fields that `IMAGE.read` returns; `width` and `size` (pixels a side) are the
    tower's.
    """
    name, wrong = image["vision_tower"], []
    if image["vision_width"] not in (None, width):
        wrong.append(f"mm_hidden_size is {image['vision_width']}, the tower has the width {width}")
    known = TOWERS.get(name.rstrip("/").rpartition("/")[2])
    if known not in (None, size):
        wrong.append(f"mm_vision_tower is {name!r} of {known} pixels a side, the tower has {size}")
    return wrong


def check_language(llm: LlamaConfig) -> None:
    """Raises a ValueError if the original has no class for the language model."""
    if llm.key_bias or llm.key_norm:
        raise ValueError(
            "the language model has key_bias or key_norm (Qwen): original LLaVA v1 and v1.5 have "
            f"classes for {' and '.join(LANGUAGES.values())} alone; the format hf holds it"
        )


def make_config(variant: Variant, kind: str) -> dict[str, Any]:
    """Returns the keys of a config.json of original LLaVA that tell a variant's sizes.

    `kind` is the language model, a key of `llama_sections.SECTIONS`. The original has classes only
    for those in `LANGUAGES`; for others `architectures` is [].
    """
    size, name = variant.vision.image_size, None
    if _is_large(variant):
        name = next((f"openai/{each}" for each, pixels in TOWERS.items() if pixels == size), None)
    return {
        "architectures": [each for each, language in LANGUAGES.items() if language == kind],
        "model_type": f"llava_{kind}",
        **language_section(kind).write(variant.llm),
        **IMAGE.write(variant.bridge),
        "mm_vision_tower": name,
    }


def _is_large(variant: Variant) -> bool:
    """Tells whether the image tower has the sizes of CLIP ViT-L/14."""
    vision = variant.vision
    return (vision.width, vision.layers, vision.patch_size) == (1024, 24, 14)
