"""Trains the frozen towers of the embedded checkpoints, and puts the parts together.

`launch/backbones.sh` calls it: first `towers`, then (after the caption runs) `merge`.
"""

import argparse
import json
import shutil
from pathlib import Path

import jax
import numpy as np

from jax_instructblip import checkpoint, files
from jax_instructblip.atomic import write_file
from jax_instructblip.backbones import build
from jax_instructblip.backbones.language import CURRICULUM, Stage, train_language
from jax_instructblip.backbones.vision import train_vision
from jax_instructblip.commands.flags import check_flags

KINDS = tuple(build.LANGUAGE)
VISION_STEPS, VISION_SCENES = 1500, 16_000
TEXT_EXAMPLES = 24_000  # a stage of the curriculum
RECIPE = "recipe.json"  # of the parts in a folder


def main(argv: list[str]) -> int:
    """Runs one of the two parts; returns 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip backbones", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    towers = parts.add_parser("towers", help="train vision tower and language models: WORK/base_*")
    towers.add_argument("work", type=Path, help="folder for what is made; finished parts are kept")
    towers.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    towers.add_argument("--seed", type=int, default=0)
    towers.add_argument(
        "--scale", type=float, default=1.0, help="of all step counts (default: %(default)s)"
    )
    merge = parts.add_parser("merge", help="towers of BASE and Q-Former of RUN: OUT, replaced")
    merge.add_argument("base", type=Path)
    merge.add_argument("run", type=Path, help="run directory of the caption phase")
    merge.add_argument("out", type=Path)
    flags = parser.parse_args(argv)
    check_flags(flags)
    if flags.part == "merge":
        _merge(flags.base, flags.run, flags.out)
    else:
        _train_towers(flags.work, flags.kinds, flags.seed, flags.scale)
    return 0


def _train_towers(work: Path, kinds: list[str], seed: int, scale: float) -> None:
    counts = {"vision_steps": VISION_STEPS, "vision_scenes": VISION_SCENES}
    counts |= {"text_steps": sum(stage.steps for stage in CURRICULUM), "examples": TEXT_EXAMPLES}
    _claim(work, {"seed": seed, "scale": scale, **counts})
    vision = work / "vision"
    if not vision.is_dir():
        steps = _scaled(VISION_STEPS, scale)
        scenes = _scaled(VISION_SCENES, min(scale, 1.0), least=256)
        tower = train_vision(build.VISION, steps=steps, scenes=scenes, seed=seed)
        checkpoint.write_tree(vision, checkpoint.flatten(_on_host(tower)).items())
    for kind in kinds:
        base = work / f"base_{kind}"
        if base.is_dir():
            continue
        curriculum = tuple(
            Stage(stage.things, _scaled(stage.steps, scale), stage.relisted) for stage in CURRICULUM
        )
        examples = _scaled(TEXT_EXAMPLES, min(scale, 1.0), least=512)
        llm = train_language(
            build.text_processor(kind), curriculum=curriculum, examples=examples, seed=seed
        )
        params = {"vision": checkpoint.read_tree(vision), "llm": _on_host(llm)}
        made = {"vision": "trained on shapes", "llm": "trained on text", "qformer": "random"}
        build.write_checkpoint(base, params, made, kind=kind, seed=seed)
        print(f"written: {base}")


def _claim(work: Path, recipe: dict[str, float]) -> None:
    """Notes how the parts in `work` are made; a ValueError where they were made otherwise."""
    path = work / RECIPE
    if not path.is_file() and not any(each.is_dir() for each in work.glob("*")):
        work.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(recipe))
        return
    before = files.read_json(path, dict) if path.is_file() else {}
    if before != recipe:
        say = lambda values: ", ".join(f"{name} {value}" for name, value in values.items())
        raise ValueError(
            f"{work} holds parts made otherwise ({say(before) or 'it is not noted how'}; asked for "
            f"is {say(recipe)}): remove it, or choose another folder (WORK= of "
            "launch/backbones.sh)"
        )


def _merge(base: Path, run: Path, out: Path) -> None:
    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    build.merge_captioned(base, run, draft)
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"written: {out}, {size / 1e6:.1f} MB")


def _scaled(count: int, scale: float, least: int = 2) -> int:
    return max(least, round(count * scale))


def _on_host(tree):
    return jax.tree.map(np.asarray, tree)
