"""FLOPs, bytes and times of the compiled programs against batch, row width, candidates and beams.

python -m benchmarks.growth [--models tiny-vicuna tiny-t5] [--repeats 5] [--plot]

Compiles training steps, rankings and beam searches of small models for this machine's CPU, at three
sizes of one quantity each. FLOPs are those of all products, bytes those that the program's kernels
read and write (`planning/traffic.py`): both are counts, the same on every run. Processor seconds,
of the program with zeros for weights, stand at the side. Writes `results/growth.json` and
`results/growth.png`; `--plot` draws the picture from the results that are there.

`bend` is the increase per unit between the last two sizes over that between the first two: 1 where
the growth is linear. XLA_FLAGS=--xla_backend_optimization_level=0 compiles in less time, with the
same counts, to slower programs.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
from jax.sharding import Mesh

from benchmarks.workload import facts
from configs import common
from jax_instructblip.atomic import write_file
from jax_instructblip.inference import beam_search, ranking
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.models import flops
from jax_instructblip.models.released import VARIANTS
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning import plan
from jax_instructblip.planning.job import Job, read_job
from jax_instructblip.planning.topology import read_topology
from jax_instructblip.planning.traffic import Traffic

RESULT = pathlib.Path(__file__).parent / "results" / "growth.json"
MODELS = ("tiny-vicuna", "tiny-t5")
NEW_TOKENS, TOKENS, BATCH = 16, 64, 4
SIZES = {  # quantity: (program, sizes)
    "batch": ("training step", (4, 8, 16)),
    "row width": ("training step", (128, 256, 384)),
    "candidates": ("ranking", (64, 128, 192)),
    "beams": ("beam search", (2, 4, 6)),
}
COUNTS = ("flops", "bytes", "processor_seconds")


def job_of(model: str, step: str, batch: int, tokens: int) -> Job:
    """Returns the job of `batch` prompts of `tokens` tokens, in float32.

    `model` is a key of `VARIANTS`, `step` is "train" or "decode".
    """
    config = common.get_config()
    config.model.frozen_dtype = config.model.dtype = "float32"
    config.data.batch_size = config.validation.batch_size = batch
    config.validation.max_new_tokens = NEW_TOKENS
    config.text.prompt_limit, config.text.qformer_limit = tokens, 32
    config.text.answer_limit = 16
    return read_job(config, VARIANTS[model], step)


def program(model: str, quantity: str, size: int, mesh: Mesh) -> tuple[Any, tuple[Any, ...], Job]:
    """Returns a jitted function, the shapes of its arguments, and the job that it belongs to.

    `quantity` is a key of `SIZES` and has the value `size`; the others are fixed.
    """
    if quantity in ("batch", "row width"):
        batch = size if quantity == "batch" else BATCH
        tokens = size - VARIANTS[model].visual_tokens if quantity == "row width" else TOKENS
        job = job_of(model, "train", batch, tokens)
        arguments = plan.job_arguments(job, mesh)
        return plan.job_function(job, mesh, arguments), arguments, job
    job = job_of(model, "decode", BATCH, TOKENS)
    params, batch, _ = plan.job_arguments(job, mesh)
    answering = plan.answering_model(job, params)
    if quantity == "beams":
        settings = GenerationConfig(max_new_tokens=NEW_TOKENS, num_beams=size)
        search = functools.partial(beam_search.beam_tokens, answering, config=settings)
        return jax.jit(lambda params, batch: search(params, batch)), (params, batch), job
    candidates = [(3 + n, 4, 5) for n in range(size)]
    chunks = ranking.make_plan([candidates], nodes=4 * size).chunks
    rank = lambda params, batch: ranking.pair_logprobs(answering, params, batch, chunks)
    return jax.jit(rank), (params, batch), job


def zeros(tree: Any) -> Any:
    """Returns arrays of zeros of the shapes of a tree; random keys of seed 0."""

    def make(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys = jax.random.split(jax.random.key(0), leaf.size).reshape(leaf.shape)
            return jax.device_put(keys, leaf.sharding)
        return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    return jax.tree.map(make, tree)


def measure(model: str, quantity: str, size: int, repeats: int, mesh: Mesh) -> dict[str, Any]:
    """Compiles the `program` of these arguments; returns its FLOPs, bytes and processor seconds."""
    function, arguments, job = program(model, quantity, size, mesh)
    with jax.set_mesh(mesh):
        traced = function.trace(*arguments)
        compiled = traced.lower().compile()
        took = []
        for _ in range(repeats + 1):
            given = jax.block_until_ready(zeros(arguments))  # its own, as it may be donated
            start = time.process_time()
            jax.block_until_ready(compiled(*given))
            took.append(time.process_time() - start)
    kernels = Traffic(compiled.as_text(), job.loops).kernels
    return {
        "size": size,
        "flops": flops.count(traced.jaxpr.jaxpr, loops=job.loops),
        "bytes": sum((each.read + each.written) * each.times for each in kernels),
        "processor_seconds": round(statistics.median(took[1:]), 4),
    }


def bend(points: list[dict[str, Any]], count: str) -> float:
    """Returns the last increase of `count` (one of `COUNTS`) per unit of size over the first."""
    slopes = [
        (right[count] - left[count]) / (right["size"] - left["size"])
        for left, right in zip(points, points[1:], strict=False)
    ]
    return round(slopes[-1] / slopes[0], 3) if slopes[0] else float("nan")


def curves(models: list[str], repeats: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name of each curve, and its program, points and bends."""
    mesh = make_mesh(1, 1, 1, read_topology("cpu:1").devices)
    for model in models:
        for quantity, (kind, sizes) in SIZES.items():
            points = [measure(model, quantity, size, repeats, mesh) for size in sizes]
            bends = {count: bend(points, count) for count in COUNTS}
            yield (
                f"{model}, {quantity}",
                {
                    "model": model,
                    "program": kind,
                    "quantity": quantity,
                    "points": points,
                    "bend": bends,
                },
            )


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
    """Draws all `curves`, by name, as a PNG: a column for each quantity, a row for each count."""
    figure = matplotlib.figure.Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(len(COUNTS), len(SIZES), squeeze=False)
    for curve in found.values():
        column = list(SIZES).index(curve["quantity"])
        sizes = [point["size"] for point in curve["points"]]
        for row, count in enumerate(COUNTS):
            panel = axes[row][column]
            label = f"{curve['model']} (bend {curve['bend'][count]:.2f})"
            panel.plot(sizes, [p[count] for p in curve["points"]], marker="o", label=label)
            panel.set(xlim=(0, None), ylim=(0, None), title=f"{curve['program']}: {count}")
            panel.set_xlabel(curve["quantity"])
            panel.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures the curves, writes them and draws them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default: %(default)s)")
    parser.add_argument("--plot", action="store_true", help="draws the results that are there")
    flags = parser.parse_args()
    document: dict[str, Any]
    if flags.plot:
        document = json.loads(RESULT.read_text(encoding="utf-8"))
    else:
        words = ["--models", *flags.models, "--repeats", str(flags.repeats)]
        document = facts("growth", words) | {"xla_flags": os.environ.get("XLA_FLAGS", "")}
        document["curves"] = {}
        for name, curve in curves(list(flags.models), flags.repeats):
            document["curves"][name] = curve
            print(f"{name}: bend {curve['bend']}", flush=True)
            write_file(RESULT, json.dumps(document, indent=1) + "\n")
    draw(document["curves"], RESULT.with_suffix(".png"))


if __name__ == "__main__":
    main()
