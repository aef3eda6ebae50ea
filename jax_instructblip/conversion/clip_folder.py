"""Reads the image tower of a CLIP folder, with all its blocks.

    config.json, model.safetensors or pytorch_model.bin   as released, with the text tower
    the same of `CLIPVisionModel`                          the image tower alone

transformers 5 saves the latter without the `vision_model.` before its names; both are read.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jax_instructblip.conversion.hf_config import quantisation_problems, read_json
from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.conversion.sections import CLIP_VIT
from jax_instructblip.conversion.weight_files import has_weights, open_weights
from jax_instructblip.models.variants import VisionConfig

PREFIX = "vision_model."
WHOLE, ALONE = "clip", "clip_vision_model"  # model_type of config.json
FILES = ("config.json", "preprocessor_config.json", "model.safetensors or pytorch_model.bin")
# Beginnings of the names of what is no part of the image tower.
OTHERS = {
    "text_model.": "CLIP's text tower",
    "text_projection.": "of CLIP's comparison of images with texts",
    "visual_projection.": "of CLIP's comparison of images with texts",
    "logit_scale": "of CLIP's comparison of images with texts",
}


@dataclasses.dataclass(frozen=True)
class ClipFolder:
    """The image tower of a CLIP folder; no weight is read yet.

    Attributes:
      folder: the folder.
      config: the tower's sizes; its last block is not computed, as LLaVA has it.
      tensors: the tower's tensors by name; every name begins with `vision_model.`.
      dropped: the reason why other tensors are left out, by the beginning of their names.
    """

    folder: Path
    config: VisionConfig
    tensors: dict[str, Any]
    dropped: dict[str, str]


def open_clip(folder: Path, *, weights: bool = True) -> ClipFolder:
    """Returns the image tower of a folder; without `weights` its sizes alone, and no tensors.

    Raises:
      ConversionError: it is no folder of CLIP, has no weights, or has sizes that cannot be held.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(
            f"{folder} is no folder of an image tower", [f"expected {', '.join(FILES)}"]
        )
    document = read_json(folder / "config.json")
    kind = document.get("model_type")
    if kind not in (WHOLE, ALONE):
        raise ConversionError(
            f"{folder} is no folder of CLIP",
            [f"model_type of config.json is {kind!r:.60}; supported: {WHOLE}, {ALONE}"],
        )
    section = document if kind == WHOLE else {CLIP_VIT.name: document}
    fields, failures = CLIP_VIT.read(section)
    failures += quantisation_problems(document)
    if failures:
        raise ConversionError(f"{folder}/config.json cannot be held", failures)
    if weights and not has_weights(folder):
        raise ConversionError(
            f"{folder} holds no weights of the image tower", [f"expected {', '.join(FILES)}"]
        )
    tensors, dropped = {}, {}
    for name, tensor in (open_weights(folder) if weights else {}).items():
        if other := next((each for each in OTHERS if name.startswith(each)), ""):
            dropped[other + "*" * other.endswith(".")] = OTHERS[other]
        else:
            tensors[PREFIX + name.removeprefix(PREFIX)] = tensor
    return ClipFolder(folder, VisionConfig(**fields), tensors, dropped)
