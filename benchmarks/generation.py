"""Greedy decoding and beam search compared with transformers' `generate`, on a CPU in float32.

python -m benchmarks.generation [--variants NAME ...] [--batches 1 8 32] [--beams 1 5] [--out FILE]

Both sides have the same random weights and questions and generate equally many tokens, alternating
in one process. Transformers runs in its fastest setting: SDPA attention, dynamic or static cache,
one thread or one per core. A call includes image, prompt and all new tokens; a step is one new
token after the first.
"""

import argparse
import collections
import functools
import itertools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.twins import Twins, make_twins, questions, quiet
from benchmarks.workload import MIDDLE, THREADS, Lengths, Measured, facts, measure
from jax_instructblip.inference.beam_search import beam_tokens
from jax_instructblip.inference.decode import generate_tokens
from jax_instructblip.inference.generation_config import GenerationConfig

CACHES = ("dynamic", "static")
FEW = 4  # tokens generated to find transformers' fastest setting


def our_call(twins: Twins, batch: dict[str, Any], beams: int) -> Callable[[int], np.ndarray]:
    """Returns a function from a number N of new tokens to our answers, ids [B, N]."""
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))

    def answer(new: int) -> np.ndarray:
        config = GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, num_beams=beams, length_rule="transformers5"
        )
        if beams > 1:
            made = beam_tokens(twins.ours, twins.params, batch, config)
        else:
            made = generate_tokens(twins.ours, twins.params, batch, keys, config)
        return np.asarray(made["tokens"])[:, 0]

    return answer


def their_call(
    twins: Twins, given: dict[str, torch.Tensor], beams: int, cache: str, threads: int
) -> Callable[[int], np.ndarray]:
    """Returns a function from a number N of new tokens to transformers' answers, ids [B, N]."""

    @torch.inference_mode()
    def answer(new: int) -> np.ndarray:
        torch.set_num_threads(threads)
        settings: dict[str, Any] = {} if cache == "dynamic" else {"cache_implementation": cache}
        with quiet():
            made = twins.theirs.generate(
                **given,
                do_sample=False,
                num_beams=beams,
                max_new_tokens=new,
                min_new_tokens=new,
                **settings,
            )
        return made[:, -new:].numpy()

    return answer


def compare(twins: Twins, size: int, beams: int, lengths: Lengths, repeats: int) -> dict[str, Any]:
    """Returns the median times of this package and transformers, and their ratios, as a dict."""
    given, batch = questions(twins.variant, size, lengths)
    ours, new = our_call(twins, batch, beams), lengths.new
    ways = {
        way: their_call(twins, given, beams, *way) for way in itertools.product(CACHES, THREADS)
    }
    made, expected = ours(new), ways[CACHES[0], THREADS[0]](new)
    ours(1)
    tried = {way: measure(functools.partial(call, FEW)).wall for way, call in ways.items()}
    fastest = min(tried, key=lambda each: tried[each])
    sides = {"ours": ours, "theirs": ways[fastest]}
    found: dict[tuple[str, int], list[Measured]] = collections.defaultdict(list)
    for _ in range(repeats):
        for count in (new, 1):
            for side, call in sides.items():
                found[side, count].append(measure(functools.partial(call, count)))
    row: dict[str, Any] = {
        "batch": size,
        "beams": beams,
        "new_tokens": new,
        "their_cache": fastest[0],
        "their_threads": fastest[1],
        "same_answers": int((made == expected).all(axis=1).sum()),
        "cores_of_other_processes": round(
            max(m.others for each in found.values() for m in each), 2
        ),
    }
    for side in sides:
        whole, first = (median("wall", found[side, count]) for count in (new, 1))
        row[side] = {
            "tokens_per_second": round(size * new / whole, 2),
            "seconds": [round(each.wall, 4) for each in found[side, new]],
            "processor_seconds": round(median("own", found[side, new]), 4),
            "seconds_to_first": round(first, 4),
            "milliseconds_a_step": round(1e3 * (whole - first) / (new - 1), 3),
        }
    for name, of in (
        ("ratio", "tokens_per_second"),
        ("ratio_of_steps", "milliseconds_a_step"),
        ("ratio_of_processor_seconds", "processor_seconds"),
    ):
        ratio = row["ours"][of] / row["theirs"][of]
        row[name] = round(ratio if of == "tokens_per_second" else 1 / ratio, 3)
    return row


def median(name: str, measured: Sequence[Measured]) -> float:
    """Returns the median of the field `name` over the measurements."""
    return statistics.median(getattr(each, name) for each in measured)


def main() -> None:
    """Measures all sizes, prints the results and writes them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="*", default=list(MIDDLE))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--beams", type=int, nargs="*", default=[1, 5])
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    flags = parser.parse_args()
    lengths = Lengths(new=flags.new)
    document = facts("generation", sys.argv[1:])
    document |= {"dtype": "float32", "lengths": vars(lengths), "results": {}}
    for name in flags.variants:
        twins, rows = make_twins(name), document["results"].setdefault(name, [])
        for beams in flags.beams:
            for size in flags.batches:
                start = time.perf_counter()
                rows.append(compare(twins, size, beams, lengths, flags.repeats))
                spent = time.perf_counter() - start
                print(f"{name} {json.dumps(rows[-1])} ({spent:.0f} s)", flush=True)
                if flags.out:
                    flags.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
