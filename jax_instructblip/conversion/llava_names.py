"""Original LLaVA's names for the tensors of the conversion tables (`tables/`).

model.layers.3.mlp.up_proj.weight              the original's
language_model.model.layers.3.mlp.up_proj...   Hugging Face's, as in our tables

model.mm_projector.weight, .bias               a projector of one layer
model.mm_projector.{0,2}.weight, .bias         of two; 1 is the GELU between them
"""

import dataclasses

from jax_instructblip.conversion.engine import Entry, Fixed
from jax_instructblip.conversion.families import family_of
from jax_instructblip.conversion.tables import llama, projector, vision
from jax_instructblip.models.variants import Variant

PROJECTOR = "model.mm_projector."
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# Of an image tower that is stored with the model, as some folders have it.
STORED_TOWER = "model.vision_tower.vision_tower.vision_model."
# Hugging Face's names of the layers of a projector of one, and of two; the original's.
_LAYERS = {1: {"linear_1": ""}, 2: {"linear_1": "0.", "linear_2": "2."}}


def llava_entries(variant: Variant, tower: str) -> list[Entry]:
    """Returns the conversion rules of all tensors of a variant, under the original's names.

    `tower` is the beginning of the names of the image tower's tensors: `STORED_TOWER` in a model's
    own folder, `vision_model.` in a folder of CLIP.
    The second layer that Hugging Face gives a projector of one (`Fixed`) does not exist here.
    """
    entries = family_of(variant).rules(variant)
    layers = _LAYERS[getattr(variant.bridge, "layers", 2)]
    return [
        dataclasses.replace(entry, source=_original(entry.source, tower, layers))
        for entry in entries
        if not isinstance(entry, Fixed)
    ]


def part(entries: list[Entry], tree: str) -> list[Entry]:
    """Returns the rules that fill leaves of `tree`, which is `llm`, `projector` or `vision`."""
    return [each for each in entries if getattr(each, "target", "").startswith(f"{tree}/")]


def _original(name: str, tower: str, layers: dict[str, str]) -> str:
    if name.startswith(vision.CLIP_PREFIX):
        return tower + name.removeprefix(vision.CLIP_PREFIX)
    if name.startswith(projector.PREFIX):
        layer, _, kind = name.removeprefix(projector.PREFIX).partition(".")
        return f"{PROJECTOR}{layers[layer]}{kind}"
    return name.removeprefix(llama.PREFIX)
