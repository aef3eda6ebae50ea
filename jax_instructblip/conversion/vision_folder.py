"""The image tower of a CLIP folder as our parameters below `vision/`, made one at a time."""

from pathlib import Path

from jax_instructblip import checkpoint
from jax_instructblip.conversion.clip_folder import ALONE, PREFIX, WHOLE, open_clip
from jax_instructblip.conversion.engine import Plan, make_plan
from jax_instructblip.conversion.hf_config import read_json
from jax_instructblip.conversion.tables import vision
from jax_instructblip.models.variants import LlamaConfig, ProjectorConfig, Variant, VisionConfig
from jax_instructblip.models.vlm import param_shapes


def is_vision_folder(folder: Path) -> bool:
    """Tells whether a folder's config.json is of CLIP or of its image tower."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in (WHOLE, ALONE)


def open_vision(folder: str | Path) -> tuple[VisionConfig, Plan]:
    """Returns the sizes of the image tower of a CLIP folder, and its parameters; none is read yet.

    Raises:
        ValueError: the tower has features that are not supported, or the tensors do not fit
            config.json; all reasons are listed.
    """
    clip = open_clip(Path(folder))
    tensors = {
        vision.CLIP_PREFIX + name.removeprefix(PREFIX): tensor
        for name, tensor in clip.tensors.items()
    }
    plan = make_plan(
        vision.clip_rules(clip.config),
        tensors,
        _leaf_shapes(clip.config),
        f"the tensors of {folder} do not fit its config.json",
    )
    return clip.config, plan


def _leaf_shapes(config: VisionConfig) -> dict[str, object]:
    """Returns the shape of each parameter below `vision/`, by its path."""
    llm = LlamaConfig(width=8, heads=1, mlp=8, layers=1, vocab=8, pad_id=0)
    variant = Variant("llava", config, ProjectorConfig(config.width, llm.width), llm)
    shapes = checkpoint.flatten(param_shapes(variant))
    return {path: leaf for path, leaf in shapes.items() if path.startswith("vision/")}
