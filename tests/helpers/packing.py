"""Samples as long as those of the paper's mixture, packed into rows of several and not.

`gradients` is what a step makes of them; `differences` compares it with that of rows of one sample.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip.checkpoint import trees
from jax_instructblip.data.batch import IGNORE, collate
from jax_instructblip.data.loader import put
from jax_instructblip.data.packing import deal
from jax_instructblip.data.spec import check
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.variants import QFormerConfig, Variant
from jax_instructblip.models.vlm import VisionLanguageModel
from jax_instructblip.parallel import rules
from jax_instructblip.parallel.mesh import batch_sharding, make_mesh
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.optimizer import adamw
from jax_instructblip.training.state import create_state, partition
from jax_instructblip.training.step import compile_step
from tests.helpers.numerics import random_params
from tests.helpers.tiny import tiny_variant

LENGTHS = Path(__file__).resolve().parents[3] / "shared" / "reference" / "lengths.json"
SHARED = (1, 2, 3, 4, 8, 12)  # samples a row
SAMPLES = 24
# Sizes of the tiny LLaVA that eight devices can share.
DIVISIBLE = {
    **{"vision.width": 16, "vision.heads": 4, "vision.mlp": 24, "projector.vision_width": 16},
    **{"projector.llm_width": 32, "llm.width": 32, "llm.heads": 4, "llm.mlp": 48},
    **{"llm.key_value_heads": 2, "llm.vocab": 64},
}


def still(kind: str) -> Variant:
    """The tiny variant of that kind, long enough, without dropout."""
    fields = {"llm.dropout": 0.0}
    if kind != "llava":
        fields |= {"qformer.dropout": 0.0, "qformer.max_positions": 256}
    return tiny_variant(kind, **fields)


def parameters(variant: Variant) -> dict[str, Any]:
    """Random parameters with small query kernels in T5.

    Raw ones make a softmax of unscaled scores so sharp that rounding shows.
    """
    small = 64**-0.5 if variant.llm.kind == "t5" else 1.0

    def shrink(path, leaf):
        names = [step.key for step in path]
        return leaf * small if names[0] == "llm" and names[-2] == "query" else leaf

    params = jax.tree_util.tree_map_with_path(shrink, random_params(variant))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def flat(variant: Variant) -> dict[str, Any]:
    """The leaves of `parameters` by path."""
    return trees.flatten(parameters(variant))


def samples(variant: Variant, count: int = SAMPLES, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Examples of recorded lengths: an image first, one in the middle, two in one sample, none."""
    rng = np.random.default_rng(seed)
    size, llm = variant.vision.image_size, variant.llm
    ids = lambda length, vocab: rng.integers(3, vocab - 1, length).astype(np.int32)
    recorded = json.loads(LENGTHS.read_text())["t5" if llm.encoder_decoder else "llama"]
    made = []
    for number, chosen in enumerate(rng.choice(len(recorded), count, replace=False)):
        instruction, length, *answer = recorded[chosen]
        frames, middle = ((1, 0), (1, 1), (2, 1), (0, 0))[number % 4]
        at = np.linspace(0, length // 2, frames + 1)[-frames:] if middle else np.zeros(frames)
        example = {
            "images": rng.integers(0, 256, (frames, size, size, 3)).astype(np.uint8),
            "image_at": at.astype(np.int32),
        }
        if isinstance(variant.bridge, QFormerConfig):  # drawn where it is not read, too
            example["qformer_tokens"] = ids(instruction, variant.qformer.vocab)
        example["tokens"] = ids(length, llm.vocab)
        if not variant.reads_instruction:
            example.pop("qformer_tokens", None)
        if llm.encoder_decoder:
            example["targets"] = ids(answer[0], llm.vocab)
            start = np.array([llm.decoder_start_id], np.int32)
            example["decoder_tokens"] = np.concatenate([start, example["targets"][:-1]])
        else:
            learned = np.arange(length) >= min(instruction, length - 1)
            example["targets"] = np.where(learned, example["tokens"], IGNORE)
        made.append(example)
    return made


def rows(variant: Variant, examples: list, shared: int) -> dict[str, np.ndarray]:
    """The examples in rows of `shared`, dealt out by length."""
    visual = variant.visual_tokens
    sizes = [
        (len(each["tokens"]) + len(each["images"]) * visual, int((each["targets"] != IGNORE).sum()))
        for each in examples
    ]
    order = deal(sizes, len(examples) // shared).flat
    batch = collate(
        [examples[number] for number in order],
        visual_tokens=visual,
        samples_per_row=shared,
        pad_id=variant.llm.pad_id,
    )
    check(batch, variant)
    return batch


def gradients(
    variant: Variant,
    batch: dict,
    *,
    devices: int = 1,
    mode: str = "jit",
    sizes: tuple[int, int, int] = (0, 1, 1),
    remat: str = "none",
    **settings: Any,
) -> dict[str, np.ndarray]:
    """The loss of a step, its targets, and the gradient of every trained leaf by path.

    `sizes` are those of a mesh of all of the `devices`, by default all in `data`. Of LLaVA the
    language model is trained as well.
    """
    data, fsdp, tensor = (sizes[0] or devices, *sizes[1:])
    mesh = make_mesh(data, fsdp, tensor, devices=jax.devices()[:devices])
    trainable = ("projector", "llm") if variant.kind == "llava" else ("qformer",)
    params = trees.unflatten(
        {path: rules.place(path, np.asarray(leaf), mesh) for path, leaf in flat(variant).items()}
    )
    chosen, frozen = partition(params, trainable)
    rate = lambda _: 1e-2
    optimizer = adamw(rate, b1=0.0)  # its first moment is then the gradient
    state = create_state(chosen, optimizer, mesh)
    count = len(batch["tokens"])
    whole = put(batch, batch_sharding(mesh), np.arange(count), count)
    scan = Scan(remat, rules.constrain_layer)
    model = VisionLanguageModel(variant, jnp.float32, Scans(scan, scan, scan))
    objective = LanguageObjective(model)
    step = compile_step(
        like=state,
        mesh=mesh,
        mode=mode,
        objective=objective,
        optimizer=optimizer,
        schedule=rate,
        **settings,
    )
    with jax.set_mesh(mesh) if mode == "jit" else contextlib.nullcontext():
        state, metrics = step(state, frozen, whole, jax.random.key(0))
    found = {
        f"gradient/{path}": leaf for path, leaf in trees.flatten(state.optimizer[0].mu).items()
    }
    found |= {"loss": metrics["loss"], "tokens": metrics["tokens"]}
    return {name: np.asarray(leaf) for name, leaf in found.items()}


def differences(found: dict, expected: dict) -> dict[str, float]:
    """The difference of the losses, and the largest one of gradients, relative to its own leaf.

    A leaf whose gradient is below a thousandth of the largest one is compared with that. Key biases
    come apart: a softmax does not see them, so theirs is rounding noise.
    """
    assert found.keys() == expected.keys() and found["tokens"] == expected["tokens"]
    names = [name for name in found if name.startswith("gradient/")]
    noise = [name for name in names if name.endswith("key/bias")]
    size = {name: np.abs(expected[name]).max() for name in names}
    floor = 1e-3 * max(size.values())
    off = lambda name: np.abs(found[name] - expected[name]).max() / max(size[name], floor)
    worst = lambda chosen: max(off(name) for name in chosen)
    return {
        "loss": float(abs(found["loss"] - expected["loss"])),
        "gradient": float(worst([name for name in names if name not in noise])),
        "key_bias": float(worst(noise)) if noise else 0.0,
    }


def roads(kind: str) -> dict[str, dict[str, float]]:
    """Distances of packed rows, along every road of eight, from plain ones on one device."""
    variant = still(kind)
    examples = samples(variant, 32)
    expected = gradients(variant, rows(variant, examples, 1))
    ways = {
        "8 devices": (2, dict(devices=8)),
        "8 devices, parts": (2, dict(devices=8, accumulate=2)),
        "pmap": (4, dict(devices=8, mode="pmap")),
        "parts": (4, dict(accumulate=4)),
    }
    return {
        name: differences(gradients(variant, rows(variant, examples, shared), **how), expected)
        for name, (shared, how) in ways.items()
    }


def second_stage() -> dict[str, dict[str, float]]:
    """Distances as of `roads` for LLaVA's second stage, split over eight devices."""
    variant = still("llava").replace(**DIVISIBLE)
    examples = samples(variant, 32)
    expected = gradients(variant, rows(variant, examples, 1))
    packed = rows(variant, examples, 4)
    return {
        str(sizes): differences(
            gradients(variant, packed, devices=8, sizes=sizes, remat="full"), expected
        )
        for sizes in ((1, 8, 1), (2, 2, 2))
    }


def show(kind: str) -> None:
    """Prints `roads` as JSON."""
    print(json.dumps(roads(kind)))
