"""Trains the frozen towers of the embedded models, or copies them, into a work folder.

WORK/recipe.json     the settings that the towers are trained with
WORK/vision          the vision tower, if it was trained
WORK/base_KIND       a checkpoint: vision tower, language model KIND, random Q-Former
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_instructblip import checkpoint, files
from jax_instructblip.atomic import write_file
from jax_instructblip.backbones import build
from jax_instructblip.backbones.language import CURRICULUM, Stage, train_language
from jax_instructblip.backbones.sizes import LANGUAGE, VISION
from jax_instructblip.backbones.vision import train_vision
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import read_params, read_source

VISION_STEPS, VISION_SCENES = 1500, 16_000
TEXT_EXAMPLES = 24_000  # per stage of the curriculum
RECIPE = "recipe.json"


def train_towers(
    work: Path, kinds: Sequence[str] = tuple(LANGUAGE), *, seed: int = 0, scale: float = 1.0
) -> None:
    """Trains the vision tower and the language models; writes `base_KIND` for each of `kinds`.

    `kinds` are keys of `LANGUAGE`. Finished parts in `work` are reused. `scale` multiplies all step
    counts; below 1, also the numbers of scenes and examples.

    Raises:
        ValueError: the parts in `work` were trained with other settings.
    """
    counts = {"vision_steps": VISION_STEPS, "vision_scenes": VISION_SCENES}
    counts |= {"text_steps": sum(stage.steps for stage in CURRICULUM), "examples": TEXT_EXAMPLES}
    _claim(work, {"seed": seed, "scale": scale, **counts})
    vision = work / "vision"
    if not vision.is_dir():
        steps = _scaled(VISION_STEPS, scale)
        scenes = _scaled(VISION_SCENES, min(scale, 1.0), least=256)
        tower = train_vision(VISION, steps=steps, scenes=scenes, seed=seed)
        checkpoint.write_tree(vision, checkpoint.flatten(_on_host(tower)).items())
    for kind in kinds:
        base = work / f"base_{kind}"
        if base.is_dir():
            continue
        curriculum = tuple(
            Stage(stage.things, _scaled(stage.steps, scale), stage.relisted) for stage in CURRICULUM
        )
        examples = _scaled(TEXT_EXAMPLES, min(scale, 1.0), least=512)
        text = build.text_processor(kind)
        llm = train_language(text, curriculum=curriculum, examples=examples, seed=seed)
        params = {"vision": checkpoint.read_tree(vision), "llm": _on_host(llm)}
        _write_base(base, params, text, seed)


def copy_towers(
    work: Path, kinds: Sequence[str] = tuple(LANGUAGE), *, seed: int = 0, scale: float = 1.0
) -> None:
    """Writes `base_KIND` for each of `kinds`, with the towers of the embedded checkpoints.

    `kinds` are keys of `LANGUAGE`. The language models keep their tokenizers; the Q-Former, which
    is random, has a new one. Existing folders in `work` are kept. `scale` is only noted: other
    parts in `work` depend on it.

    Raises:
        ValueError: the parts in `work` were made with other settings.
    """
    _claim(work, {"towers": "of the embedded checkpoints", "seed": seed, "scale": scale})
    for kind in kinds:
        base = work / f"base_{kind}"
        if base.is_dir():
            continue
        source, fresh = read_source(f"shapes_{kind}"), build.text_processor(kind)
        variant = dataclasses.replace(fresh.variant, llm=source.variant.llm)
        stored = TextProcessor.load(source.folder, source.variant)
        text = TextProcessor(variant, stored.llm, fresh.qformer)
        params = read_params(source, lambda path, array: array)
        del params["qformer"]
        _write_base(base, params, text, seed, tokenizer=source.folder / "tokenizer")


def _write_base(
    base: Path,
    params: dict[str, Any],
    text: TextProcessor,
    seed: int,
    tokenizer: Path | None = None,
) -> None:
    """Writes a checkpoint folder of trained towers and a random Q-Former."""
    history = {**build.TOWERS, "qformer": "random"}
    more = {"processor": text, "tokenizer": tokenizer, "seed": seed}
    build.write_checkpoint(base, params, history, **more)
    print(f"written: {base}")


def _claim(work: Path, recipe: dict[str, Any]) -> None:
    """Writes the recipe to a new work folder; a ValueError if an existing recipe differs."""
    path = work / RECIPE
    if not path.is_file() and not any(each.is_dir() for each in work.glob("*")):
        work.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(recipe))
        return
    before = files.read_json(path, dict) if path.is_file() else {}
    if before != recipe:
        say = lambda values: ", ".join(f"{name} {value}" for name, value in values.items())
        raise ValueError(
            f"{work} holds parts of other settings: found "
            f"{say(before) or f'none, as there is no {RECIPE}'}; expected {say(recipe)}. Remove "
            "the folder, or choose another (WORK= of launch/backbones.sh)"
        )


def _scaled(count: int, scale: float, least: int = 2) -> int:
    return max(least, round(count * scale))


def _on_host(tree):
    return jax.tree.map(np.asarray, tree)
