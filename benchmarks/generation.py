"""The suite `generate`: greedy decoding and beam search beside transformers' `generate`.

A call includes image, prompt and all new tokens; the answers of both sides are compared.
Transformers runs in its fastest setting: dynamic or static cache, one thread or one per core, of
which a few tokens are timed while it is built.
"""

import functools
import itertools
from typing import Any

import numpy as np

from benchmarks.sides import Built, Case
from benchmarks.workload import SIZES, THREADS, Lengths, Questions, measure, variant_of

CACHES = ("dynamic", "static")
FEW = 4  # tokens generated to find transformers' fastest setting


def cases(sizes: str) -> list[Case]:
    """Returns the cases of a size of models, a key of `workload.SIZES`: greedy, then five beams."""
    new = {"tiny": 8, "middle": 16, "full": 64}[sizes]
    return [
        {"variant": name, "beams": beams, "batch": batch, "new": new}
        for name in SIZES[sizes]
        for beams in (1, 5)
        for batch in (1, 32)
    ]


def ours(case: Case) -> Built:
    """Returns our side, whose call returns the ids of answers, `[B, N]`."""
    import jax

    from benchmarks.ours import device_peak, load, question_batch
    from jax_instructblip.inference.beam_search import beam_tokens
    from jax_instructblip.inference.decode import generate_tokens
    from jax_instructblip.inference.generation_config import GenerationConfig

    model, params = load(case, unstacked=True)
    asked = Questions.draw(model.variant, case["batch"], Lengths())
    batch = question_batch(model.variant, asked)
    keys, new = jax.random.split(jax.random.key(0), case["batch"]), case["new"]
    settings = dict(max_new_tokens=new, min_new_tokens=new, length_rule="transformers5")
    config = GenerationConfig(num_beams=case["beams"], **settings)

    def call() -> list[list[int]]:
        if case["beams"] > 1:
            made = beam_tokens(model, params, batch, config)
        else:
            made = generate_tokens(model, params, batch, keys, config)
        return np.asarray(made["tokens"])[:, 0].tolist()

    return Built(call, facts(case), device_peak)


def transformers(case: Case) -> Built:
    """Returns the side of transformers, whose call returns the ids of answers, `[B, N]`."""
    import torch

    from benchmarks import theirs

    variant, model = variant_of(case["variant"]), theirs.load(case)
    asked = Questions.draw(variant, case["batch"], Lengths())
    given = theirs.question_inputs(variant, asked, getattr(torch, case["dtype"]))
    on_gpu = theirs.device().type == "cuda"

    @torch.inference_mode()
    def answer(cache: str, threads: int, new: int) -> list[list[int]]:
        torch.set_num_threads(threads)
        settings: dict[str, Any] = {} if cache == "dynamic" else {"cache_implementation": cache}
        with theirs.quiet():
            made = model.generate(
                **given,
                do_sample=False,
                num_beams=case["beams"],
                max_new_tokens=new,
                min_new_tokens=new,
                **settings,
            )
        return made[:, -new:].tolist()

    ways = [*itertools.product(CACHES, THREADS[:1] if on_gpu else THREADS)]
    answer(*ways[0], FEW)
    fastest = min(ways, key=lambda way: measure(functools.partial(answer, *way, FEW)).wall)
    call = functools.partial(answer, *fastest, case["new"])
    chosen = {"cache": fastest[0], "threads": fastest[1]}
    return Built(call, facts(case) | chosen, theirs.device_peak if on_gpu else None)


def facts(case: Case) -> dict[str, Any]:
    """Returns the work of a call: the number of new tokens of all answers."""
    return {"work": case["batch"] * case["new"], "unit": "tokens"}


SIDES = {"jax_instructblip": ours, "transformers": transformers}
