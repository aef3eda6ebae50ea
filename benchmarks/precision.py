"""The error of bfloat16 against float64: this package and PyTorch under autocast.

python -m benchmarks.precision [--models NAME ...]     measures, writes benchmarks/results/
python -m benchmarks.precision --table                 prints the written results as a table

A model with random weights runs on each of `SIDES`, each in its own process. Compared are the
logits, the gradient of the first step, the losses of five steps of the paper's AdamW at its peak
rate, and the trained weights after these steps. Frozen weights are rounded to bfloat16 before, and
dropout is off, so that only the computation differs.

    float64    transformers on PyTorch, all in float64: the reference for the others
    float32    ours with `model.dtype=float32`: shows that both sides compute the same
    bfloat16   ours with its default training dtypes
    autocast   transformers under `torch.autocast(bfloat16)`, weights in float32 (`autocast.py`)
    released   transformers under autocast, weights in the dtypes that LAVIS loads
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import autocast
from benchmarks.workload import Lengths, facts
from jax_instructblip.checkpoint.trees import flatten
from jax_instructblip.conversion.hf_folder import read_hf
from jax_instructblip.data.batch import IGNORE, collate
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vlm import VisionLanguageModel
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.optimizer import adamw
from jax_instructblip.training.state import create_state, partition
from jax_instructblip.training.step import compile_step

STEPS = 5
SIDES = ("float64", "float32", "bfloat16", "autocast", "released")
RESULTS = pathlib.Path("benchmarks/results/precision.json")
_CUT = {"vision.layers": 4, "qformer.layers": 4, "llm.encoder_layers": 4, "llm.decoder_layers": 4}
# Forbids XLA to skip a rounding to bfloat16 when it fuses operations. Optimisation is off, as
# programs run only a few times.
_FLAGS = "--xla_allow_excess_precision=false --xla_backend_optimization_level=0"


class Case(NamedTuple):
    """A model to measure.

    Attributes:
      variant: its sizes.
      lengths: tokens per sample.
      rows: samples per batch.
      seeds: number of random weights; mean errors are averaged over them, for largest errors the
        maximum is taken.
      sharp: factor of query and head kernels; above 1 the softmaxes are more peaked.
    """

    variant: Variant
    lengths: Lengths
    rows: int
    seeds: int
    sharp: float


_SHORT = Lengths(instruction=8, prompt=12, answer=8)
CASES = {
    "FlanT5-XL, 4 + 4 layers": Case(
        get_variant("instructblip-flan-t5-xl").replace(**_CUT), Lengths(prompt=32), 2, 1, 1.0
    ),
    "sharp tiny T5": Case(get_variant("tiny-t5"), _SHORT, 16, 4, 6.0),
    "sharp tiny Vicuna": Case(get_variant("tiny-vicuna"), _SHORT, 16, 4, 6.0),
}


def question_ids(case: Case, step: int) -> dict[str, np.ndarray]:
    """Returns random pixels and token ids for the batch of `step`, without padding.

    They are `images` `[B, 1, S, S, 3]` uint8, and `instruction`, `prompt` and `answer`, int32.
    """
    rng, lengths = np.random.default_rng(step), case.lengths
    ids = lambda width, vocab: rng.integers(3, vocab, (case.rows, width)).astype(np.int32)
    side, vocab = case.variant.vision.image_size, min(case.variant.llm.vocab, 32000) - 2
    return {
        "images": rng.integers(0, 256, (case.rows, 1, side, side, 3), dtype=np.uint8),
        "instruction": ids(lengths.instruction, case.variant.qformer.vocab),
        "prompt": ids(lengths.prompt, vocab),
        "answer": ids(lengths.answer, vocab),
    }


def make_batch(case: Case, step: int) -> dict[str, jax.Array]:
    """Returns our batch of `step`, one sample per row, in the layout of `models/vlm.py`."""
    ids, llm = question_ids(case, step), case.variant.llm
    leaves = {
        "images": ids["images"],
        "qformer_tokens": ids["instruction"],
        "tokens": ids["prompt"],
    }
    if llm.encoder_decoder:
        leaves["targets"] = ids["answer"]
        leaves["decoder_tokens"] = np.pad(ids["answer"][:, :-1], ((0, 0), (1, 0)))
    else:
        leaves["tokens"] = np.concatenate([ids["prompt"], ids["answer"]], axis=1)
        unlearned = ((0, 0), (ids["prompt"].shape[1], 0))
        leaves["targets"] = np.pad(ids["answer"], unlearned, constant_values=IGNORE)
    rows = range(len(leaves["tokens"]))
    examples = [{name: leaf[row] for name, leaf in leaves.items()} for row in rows]
    batch = collate(examples, visual_tokens=case.variant.visual_tokens)
    return {key: jnp.asarray(leaf) for key, leaf in batch.items()}


def measure_ours(case: Case, dtype: str, folder: pathlib.Path, steps: int) -> dict[str, np.ndarray]:
    """Runs this package in `dtype`; returns arrays by the names listed in `measure`."""

    def place(path: str, array: np.ndarray) -> jax.Array:
        return jnp.asarray(array, jnp.float32 if path.startswith("qformer/") else dtype)

    variant, params = read_hf(folder, place=place)
    still = variant.replace(**{"qformer.dropout": 0.0, "llm.dropout": 0.0})
    model, narrow = VisionLanguageModel(still, jnp.dtype(dtype)), dtype != "float32"
    trainable, frozen = partition(params, ("qformer",))
    rate = lambda _: autocast.RATE
    optimizer = adamw(rate)
    chosen = dict(objective=LanguageObjective(model), optimizer=optimizer, schedule=rate)
    step = compile_step(**chosen, narrow_weights=narrow)
    # As in `compile_step`: stacked weights must not be converted to float32 before the scan.
    options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if narrow else None
    apply = jax.jit(
        lambda params, batch: model.apply({"params": params}, batch), compiler_options=options
    )
    read = lambda trained: np.asarray(apply({**frozen, **trained}, make_batch(case, 0)), np.float64)
    state = create_state(trainable, optimizer)
    found, losses = {"logits": read(state.params)}, []
    for number in range(steps):
        state, metrics = step(state, frozen, make_batch(case, number), jax.random.key(0))
        losses.append(float(metrics["loss"]))
        if number == 0:  # Adam's first moment is a tenth of the gradient
            moments = flatten(state.optimizer[0].mu).items()
            found |= {f"gradient:{path}": 10 * np.asarray(leaf) for path, leaf in moments}
    if steps:
        found |= {f"after:{path}": np.asarray(leaf) for path, leaf in flatten(state.params).items()}
        found |= {"losses": np.array(losses), "logits_after": read(state.params)}
    return found


def measure(case: Case, side: str, folder: pathlib.Path, steps: int) -> dict[str, np.ndarray]:
    """Runs `side`, one of `SIDES`, with the weights in `folder`; returns arrays by these names.

    logits, logits_after   [B, U, V] of the first batch's answers, before and after the steps
    losses                 [steps]
    gradient:PATH          gradient of the first step, by our leaf paths
    after:PATH             the trained weights after the steps
    """
    if side in ("float32", "bfloat16"):
        return measure_ours(case, side, folder, steps)
    batches = [question_ids(case, number) for number in range(max(steps, 1))]
    return autocast.measure(case.variant, side, folder, batches, steps)


def compare(found: dict, truth: dict, before: dict) -> dict[str, float]:
    """Returns relative errors, by name, of the arrays `found` against the float64 ones, `truth`.

    `before` are the trained weights at the start, by leaf path. Key biases are left out: softmax is
    invariant to them, so their gradients are rounding noise.
    """
    errors = {}
    for name in ("logits", "logits_after"):
        scale = np.sqrt(np.square(truth[name]).mean())
        difference = np.abs(found[name] - truth[name])
        errors[f"{name}_max"] = float(difference.max() / scale)
        errors[f"{name}_mean"] = float(difference.mean() / scale)
        same = found[name].argmax(-1) == truth[name].argmax(-1)
        errors[f"{name}_top1"] = float(same.mean())
    losses = np.abs(found["losses"] - truth["losses"]) / truth["losses"]
    errors |= {"loss_max": float(losses.max()), "loss_mean": float(losses.mean())}
    paths = [path for path in before if not path.endswith("key/bias")]
    join = lambda leaves: np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in leaves])
    part = lambda tree, name: join(tree[f"{name}:{path}"] for path in paths)
    norm = np.linalg.norm
    gradient, after = part(truth, "gradient"), part(truth, "after")
    errors["gradient"] = float(norm(part(found, "gradient") - gradient) / norm(gradient))
    moved = norm(after - join(before[path] for path in paths))
    errors["drift"] = float(norm(part(found, "after") - after) / moved)
    return errors


def run_side(name: str, side: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns what `measure` returns, computed in a new process.

    `name` is a key of `CASES`. So two frameworks never hold memory at the same time.
    """
    out = folder / f"{side}.npz"
    words = ["--case", name, "--side", side, "--folder", str(folder)]
    settings = {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent),  # other seeds have the same programs
    }
    subprocess.run(
        [sys.executable, "-m", "benchmarks.precision", *words],
        check=True,
        env={**os.environ, **settings},
    )
    with np.load(out) as found:
        values = dict(found)
    out.unlink()
    return values


def run_case(name: str) -> dict[str, dict[str, float]]:
    """Returns the errors of each of `SIDES` except float64, over all seeds of the case `name`."""
    case, rows = CASES[name], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(case.seeds):
            place = pathlib.Path(folder) / "weights"
            before = autocast.make_weights(case.variant, case.sharp, seed, place)
            truth = run_side(name, SIDES[0], place)
            rows.append({})
            for side in SIDES[1:]:
                rows[-1][side] = compare(run_side(name, side, place), truth, before)
                print(name, seed, side, rows[-1][side], flush=True)
    most = lambda key: max if key.endswith("max") else np.mean
    return {
        side: {key: float(most(key)([row[side][key] for row in rows])) for key in rows[0][side]}
        for side in SIDES[1:]
    }


COLUMNS = {
    "logits, mean error": "logits_mean",
    "largest": "logits_max",
    "top-1 kept": "logits_top1",
    "loss, mean error": "loss_mean",
    "gradient": "gradient",
    "drift in 5 steps": "drift",
}
NAMES = {
    "float32": "ours, float32",
    "bfloat16": "**ours, bfloat16**",
    "autocast": "torch autocast, float32 weights",
    "released": "torch autocast, weights as LAVIS loads them",
}


def table(results: dict[str, Any]) -> str:
    """Formats the results of `run_case`, by case, as a Markdown table."""
    lines = [
        "| model | side | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for name, sides in results["cases"].items():
        for side, errors in sides.items():
            cells = [
                f"{errors[key]:.1%}" if "top1" in key else f"{errors[key]:.2g}"
                for key in COLUMNS.values()
            ]
            lines.append(f"| {name} | {NAMES[side]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures and writes the results, then prints them as a table.

    With the hidden flag `--side`, as started by `run_side`, only runs this side.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the last results")
    for name in ("case", "side", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        folder = pathlib.Path(flags.folder)
        found = measure(CASES[flags.case], flags.side, folder, STEPS)
        np.savez(folder / f"{flags.side}.npz", **found)
        return
    if not flags.table:
        results = {**facts("precision", sys.argv[1:]), "steps": STEPS, "cases": {}}
        for name in flags.models:
            results["cases"][name] = run_case(name)
            flags.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(json.loads(flags.out.read_text())))


if __name__ == "__main__":
    main()
