"""Throughput of the engine and of static batches, on answers of mixed lengths, in one process.

python -m benchmarks.engine [--variants NAME ...] [--lengths NAME ...] [--requests 48] [--out FILE]

The requests' numbers of new tokens are powers of two, so that static batches need few programs:

    mixture  answers of the paper's training mixture (`mixture_lengths.json`), rounded up: mostly
             short, so that reading the prompts is a large part of the work
    uniform  all of `LIMITS` equally often

A static batch holds as many consecutive requests as the engine has slots, and decodes until its
longest answer ends; the engine refills each slot at once. Both sides have the same random weights
and prepared requests, decode greedily and must give the same tokens; they alternate. A slot-step is
one decoding step of one slot. Slot-steps, steps (each reads all weights once) and how many prompts
were read at once are counted, not measured: they are the same on a busy machine.
"""

import argparse
import collections
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.packing import read_lengths
from benchmarks.workload import Measured, facts, measure, variant_of
from jax_instructblip.atomic import write_file
from jax_instructblip.checkpoint import flatten, unflatten
from jax_instructblip.data.batch import collate
from jax_instructblip.inference.decode import generate_tokens
from jax_instructblip.inference.engine import Engine
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.inference.sampling import TracedSettings
from jax_instructblip.inference.slots import Request
from jax_instructblip.models.variants import T5Config, Variant
from jax_instructblip.models.vlm import init_params, unstack_decoder

RESULT = pathlib.Path(__file__).parent / "results" / "engine.json"
VARIANTS = {"middle-vicuna": "vicuna_7b", "middle-t5": "flan_t5_xl"}  # each with its lengths
LENGTHS = ("uniform", "mixture")
LIMITS = (4, 8, 16, 32, 64, 128)  # new tokens of an answer
PROMPT = 16  # tokens of a prompt, and of its instruction


class Ids:
    """Stands for the tokenizers, which the measured time leaves out."""

    def __init__(self, variant: Variant):
        self.variant = variant

    def stop_table(self) -> None:
        """Returns None: eos alone ends an answer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns "": texts are not measured."""
        return ""


def make_pipeline(name: str) -> InstructBlipPipeline:
    """Returns the variant `name` of `workload.MIDDLE` with smaller images and random weights."""
    variant = variant_of(name)
    vision = dataclasses.replace(variant.vision, image_size=56)
    variant = dataclasses.replace(variant, vision=vision)
    flat = flatten(init_params(variant, jax.random.key(0)))
    if isinstance(variant.llm, T5Config):  # unscaled scores would make each softmax a choice of one
        queries = [path for path in flat if path.startswith("llm/") and "/query/" in path]
        flat |= {path: flat[path] * variant.llm.head_width**-0.5 for path in queries}
    params = unstack_decoder(variant, unflatten(flat))
    ids: Any = Ids(variant)
    return InstructBlipPipeline(variant, params, ids)


def make_requests(variant: Variant, lengths: str, count: int) -> list[Request]:
    """Returns `count` requests with random images and ids, and limits drawn from `lengths`.

    `lengths` is "uniform", or a value of `VARIANTS` for recorded lengths.
    """
    rng, side, m = np.random.default_rng(0), variant.vision.image_size, variant.llm
    drawn = rng.choice(LIMITS if lengths == "uniform" else read_lengths(lengths)[:, 2], count)
    requests = []
    for row, length in enumerate(drawn):
        limit = next((each for each in LIMITS if each >= length), LIMITS[-1])
        ids = lambda vocab: rng.integers(3, min(vocab, 30_000), PROMPT).astype(np.int32)
        example = {
            "images": rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8),
            "qformer_tokens": ids(variant.qformer.vocab),
            "tokens": ids(m.vocab),
        }
        batch = collate([example], visual_tokens=variant.visual_tokens)
        config = GenerationConfig(max_new_tokens=limit, min_new_tokens=limit)
        key = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(row), 1)))
        settings = jax.device_get(TracedSettings.of(config))
        requests.append(Request(batch, key, settings, np.int32(limit)))
    return requests


def static_call(
    blip: InstructBlipPipeline, requests: Sequence[Request], size: int
) -> tuple[Callable[[], list[list[int]]], dict[str, Any]]:
    """Returns a function that answers in batches of `size`, and the counts of what it takes.

    The function returns the tokens of each answer; the counts are `slot_steps`, `steps` and
    `prompts_at_once`.
    """
    batches = []
    for start in range(0, len(requests), size):
        rows = requests[start : start + size]
        batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(row.batch for row in rows))
        longest = int(max(row.limit for row in rows))
        batches.append((rows, batch, longest))

    def answer() -> list[list[int]]:
        answers = []
        for rows, batch, longest in batches:
            config = GenerationConfig(max_new_tokens=longest, min_new_tokens=longest)
            keys = jax.random.split(jax.random.key(0), len(rows))
            made = generate_tokens(blip.model, blip.params, batch, keys, config)
            tokens = np.asarray(made["tokens"])[:, 0]
            answers += [row[: each.limit].tolist() for row, each in zip(tokens, rows, strict=True)]
        return answers

    reads = collections.Counter(len(rows) for rows, _, _ in batches)
    return answer, {
        "slot_steps": sum(len(rows) * (longest - 1) for rows, _, longest in batches),
        "steps": sum(longest - 1 for _, _, longest in batches),
        "prompts_at_once": dict(reads),
    }


def engine_call(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """Answers all requests with the engine; returns the tokens of each answer."""
    answers = dict(engine.answers(enumerate(requests)))
    return [list(answers[row].result().tokens) for row in range(len(requests))]


def compare(
    blip: InstructBlipPipeline, lengths: str, count: int, slots: int, repeats: int
) -> dict[str, Any]:
    """Returns throughputs, slot-steps and their ratios, engine to static, as a dict.

    `lengths` and `count` are those of `make_requests`; `slots` is also the size of a batch.
    """
    requests = make_requests(blip.variant, lengths, count)
    static, static_counts = static_call(blip, requests, slots)
    width = requests[0].batch["tokens"].shape[1]
    engine = Engine(blip, slots=slots, width=width, max_new_tokens=LIMITS[-1])
    engine.warm_up(requests)
    sides = {"static": static, "engine": functools.partial(engine_call, engine, requests)}
    same = sum(a == b for a, b in zip(static(), sides["engine"](), strict=True))
    engine_counts = {
        "slot_steps": engine.slot_steps,
        "steps": engine.steps,
        "prompts_at_once": dict(sorted(engine.reads.items())),
    }
    counts = {"static": static_counts, "engine": engine_counts}
    found: dict[str, list[Measured]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, call in sides.items():
            found[side].append(measure(call))
    tokens = int(sum(request.limit for request in requests))
    row: dict[str, Any] = {
        "requests": count,
        "slots": slots,
        "new_tokens": tokens,
        "same_answers": same,
        "cores_of_other_processes": round(
            max(m.others for each in found.values() for m in each), 2
        ),
    }
    for side, times in found.items():
        wall = statistics.median(each.wall for each in times)
        row[side] = counts[side] | {
            "seconds": [round(each.wall, 3) for each in times],
            "processor_seconds": round(statistics.median(each.own for each in times), 3),
            "tokens_per_second": round(tokens / wall, 2),
        }
    ratio = lambda of, up, down: round(row[up][of] / row[down][of], 3)
    return row | {
        "throughput_ratio": ratio("tokens_per_second", "engine", "static"),
        "processor_seconds_ratio": ratio("processor_seconds", "static", "engine"),
        "slot_steps_ratio": ratio("slot_steps", "static", "engine"),
        "steps_ratio": ratio("steps", "static", "engine"),
    }


def main() -> None:
    """Measures all variants, prints the results and writes them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--lengths", nargs="*", default=LENGTHS, choices=LENGTHS)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=RESULT, help="JSON file")
    flags = parser.parse_args()
    document = facts("engine", sys.argv[1:]) | {"dtype": "float32", "results": {}}
    for name in flags.variants:
        blip, rows = make_pipeline(name), document["results"].setdefault(name, {})
        for lengths in flags.lengths:
            recorded = VARIANTS[name] if lengths == "mixture" else lengths
            row = compare(blip, recorded, flags.requests, flags.slots, flags.repeats)
            rows[lengths] = row
            print(f"{name} {lengths} {json.dumps(row)}", flush=True)
            write_file(flags.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
