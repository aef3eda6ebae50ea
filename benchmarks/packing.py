"""Compares rows of several samples with rows of one, for the paper's four trainings.

python -m benchmarks.packing [--only NAME] [--steps 200]

Draws batches from `mixture_lengths.json`, token counts of samples of the paper's mixture, lays them
out as training does (`jax_instructblip/data/packing.py`), and counts

    real_slots, real_targets    mean share of row positions, and of target positions, that no
                                padding takes (FlanT5: of the encoder and of the decoder)
    programs                    different shapes of a batch, each of which is compiled once
    flops_per_sample            products of the train step, counted on its jaxpr for every shape of
                                a batch, all towers and attention over whole rows

A padded batch has one sample a row and the lengths of `config.data.buckets`. No weights are made:
a step is traced on shapes alone, in seconds. Writes `results/packing.json`.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.workload import facts
from jax_instructblip.atomic import write_file
from jax_instructblip.data.packing import deal, row_lengths

FOLDER = pathlib.Path(__file__).parent
LENGTHS = FOLDER / "mixture_lengths.json"
RESULT = FOLDER / "results" / "packing.json"
CONFIGS = ("vicuna_7b", "vicuna_13b", "flan_t5_xl", "flan_t5_xxl")
STEPS = 200
AXES = ("slots", "targets", "qformer_tokens")

Sizes = list[dict[str, int]]  # of each sample of a batch
Shape = dict[str, int]  # widths of a batch, by name


def read_lengths(name: str) -> np.ndarray:
    """Returns [samples, 3]: instruction ids, prompt tokens and targets of recorded samples.

    `name` is one of `CONFIGS`; the prompt of a Vicuna is the whole text, with the answer.
    """
    lengths = json.loads(LENGTHS.read_text(encoding="utf-8"))
    if name.startswith("flan_t5"):
        return np.array(lengths["flan_t5"])
    text, row = np.array(lengths["vicuna"]).T
    return np.stack([text, row, np.maximum(row - text, 1)], axis=1)


def draw(name: str, batch: int, visual: int, steps: int) -> Iterator[Sizes]:
    """Yields the sizes of the samples of each of `steps` batches, one image a sample.

    `name` is as in `read_lengths`, `batch` the number of samples, `visual` the visual vectors of an
    image. Sizes are `images`, `qformer_tokens`, `slots` (with visual vectors) and `targets`.
    """
    recorded, rng = read_lengths(name), np.random.default_rng(0)
    for _ in range(steps):
        chosen = recorded[rng.integers(0, len(recorded), batch)].tolist()
        yield [
            {"images": 1, "qformer_tokens": text, "slots": visual + tokens, "targets": targets}
            for text, tokens, targets in chosen
        ]


def pack(sizes: Sizes, samples_per_row: int, text_limit: int) -> Shape:
    """Returns the shape of a packed batch, the numbers of its rows and samples included.

    `text_limit` is the most instruction ids of a sample.
    """
    measures = [(size["slots"], size["targets"]) for size in sizes]
    shared = deal(measures, len(sizes) // samples_per_row)
    return row_lengths(sizes, shared, text_limit) | {"rows": len(shared)}


def shares(sizes: Sizes, shape: Mapping[str, int]) -> tuple[float, float]:
    """Returns the shares of a batch's slots and of its targets that are not padding.

    `sizes` are those of its samples, `shape` is what `pack` or `pad` returned.
    """
    real = lambda name: sum(size[name] for size in sizes) / (shape["rows"] * shape[name])
    return real("slots"), real("targets")


def pad(sizes: Sizes, lengths: Mapping[str, int], visual: int, buckets: tuple[int, ...]) -> Shape:
    """Returns the shape of a batch with one sample a row.

    `lengths` are the limits of `qformer_tokens`, `tokens` and `targets`, `visual` is the number of
    visual vectors of a sample, `buckets` are the lengths to which texts are padded.
    """

    def fit(length: int, limit: int) -> int:
        return min([each for each in (*buckets, limit) if length <= each <= limit], default=limit)

    longest = lambda name: max(size[name] for size in sizes)
    return {
        "images": 1,
        "qformer_tokens": fit(longest("qformer_tokens"), lengths["qformer_tokens"]),
        "slots": visual + fit(longest("slots") - visual, lengths["tokens"]),
        "targets": fit(longest("targets"), lengths["targets"]),
        "rows": len(sizes),
    }


def count(job: Any, shape: Mapping[str, int]) -> int:
    """Returns the FLOPs of all products of a train step on a batch of that shape, by its jaxpr.

    `job` is a `planning.job.Job`, `shape` what `pack` or `pad` returned.
    """
    import jax

    from jax_instructblip.models import flops
    from jax_instructblip.parallel.mesh import make_mesh
    from jax_instructblip.planning import plan

    shared = job.batch // shape["rows"]
    lengths = {
        "qformer_tokens": shape["qformer_tokens"],
        "tokens": shape["slots"] - job.variant.visual_tokens,
        "targets": shape["targets"],
    }
    row = {"row_slots": shape["slots"], "row_targets": shape["targets"]}
    job = dataclasses.replace(job, samples_per_row=shared, lengths=lengths, row=row)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    arguments = plan.job_arguments(job, mesh)
    traced = plan.job_function(job, mesh, arguments).trace(*arguments)
    return flops.count(traced.jaxpr.jaxpr)


def measure(name: str, steps: int) -> dict[str, Any]:
    """Returns shares, shapes and FLOPs of one of `CONFIGS`, packed and padded, in `steps` steps."""
    from jax_instructblip.planning.job import read_job, read_variant
    from jax_instructblip.training.config_file import load_config

    config = load_config(str(FOLDER.parent / "configs" / f"paper_{name}.py"))
    job = read_job(config, read_variant(config)[1])
    visual, shared = job.variant.visual_tokens, job.samples_per_row
    found: dict[str, Any] = {"batch": job.batch, "samples_per_row": shared, "steps": steps}
    drawn = list(draw(name, job.batch, visual, steps))
    ways = {
        "packed": [pack(sizes, shared, job.lengths["qformer_tokens"]) for sizes in drawn],
        "padded": [pad(sizes, job.lengths, visual, tuple(config.data.buckets)) for sizes in drawn],
    }
    for way, shapes in ways.items():
        real = np.mean([shares(*each) for each in zip(drawn, shapes, strict=True)], axis=0)
        times = collections.Counter(tuple(shape.items()) for shape in shapes)
        counted = {shape: count(job, dict(shape)) for shape in times}
        mean = sum(counted[shape] * n for shape, n in times.items()) / steps / job.batch
        found[way] = {
            "real_slots": round(float(real[0]), 4),
            "real_targets": round(float(real[1]), 4),
            "programs": len(times),
            "widths": {axis: _counts(shapes, axis) for axis in AXES},
            "flops_per_sample": round(mean),
        }
    found["flops_ratio"] = round(
        found["packed"]["flops_per_sample"] / found["padded"]["flops_per_sample"], 4
    )
    means = np.mean([list(size.values()) for sizes in drawn for size in sizes], axis=0)
    found["plan"] = {  # what the config tells the planner
        "row": [max(shape[axis] for shape in ways["packed"]) for axis in ("slots", "targets")],
        "sample": [round(float(mean), 1) for mean in means],
    }
    return found


def _counts(shapes: list[Shape], axis: str) -> dict[int, int]:
    """Returns the number of batches of each width along `axis`."""
    return dict(sorted(collections.Counter(shape[axis] for shape in shapes).items()))


def main() -> None:
    """Measures the trainings and merges them into the results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=CONFIGS, help="measures one training")
    parser.add_argument("--steps", type=int, default=STEPS, help="batches (default: %(default)s)")
    flags = parser.parse_args()
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    for name in CONFIGS if flags.only is None else (flags.only,):
        found[name] = measure(name, flags.steps)
        print(json.dumps({name: found[name]}, indent=1), flush=True)
        head = facts("packing", [])
        order = [each for each in CONFIGS if each in found]
        document = {**head, **{each: found[each] for each in order}}
        write_file(RESULT, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
