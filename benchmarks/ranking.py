"""Ranking of many candidates, compared with transformers, on a CPU in float32.

python -m benchmarks.ranking [--variants NAME ...] [--candidates 1000] [--out FILE]

Both sides have the same random weights, question and candidates.

    theirs          scores candidates as the released `predict_class`: the image, and for T5 the
                    encoder, run once per question; each candidate is a row of its own, for LLaMA
                    after a copy of the prompt; logits are computed for the candidate's tokens only.
                    Batch size and number of threads are the fastest of those tried.
    their_forward   calls the model's own `forward` on image, prompt and candidate, for fewer
                    candidates.

`our_error` and `their_error` are the largest differences from transformers' scores in float64.
`growth` has our seconds for other numbers of candidates and prompt lengths. `inner_tokens` is the
number of tokens that our model reads after the prompt: the distinct prefixes of the candidates.
"""

import argparse
import copy
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.twins import Twins, make_twins, questions
from benchmarks.workload import MIDDLE, THREADS, VARIANTS, Lengths, Measured, facts, measure
from jax_instructblip.inference.ranking import make_plan, pair_logprobs, score

Ids = tuple[int, ...]
BATCHES = (16, 64)  # batch sizes tried for transformers
PROMPTS = (16, 512)  # further prompt lengths, in tokens


def draw_candidates(twins: Twins, count: int, words: int, even: bool = False) -> list[Ids]:
    """Returns `count` distinct random candidates of 2 to 4 tokens, with ids below `words`.

    T5's end with eos. Few ids are frequent and many rare, as words are (the logarithm of the id is
    uniform), so that some candidates share a prefix; with `even` all ids are equally frequent.
    """
    rng, found = np.random.default_rng(0), {}
    llm = twins.variant.llm
    while len(found) < count:
        size = rng.integers(2, 5) - (llm.kind == "t5")
        drawn = rng.uniform(0, np.log(words - 3), size)
        ids = rng.integers(3, words, size) if even else 2 + np.exp(drawn).astype(int)
        found[tuple(ids.tolist() + [llm.eos_id] * (llm.kind == "t5"))] = None
    return list(found)


def our_scores(twins: Twins, batch: dict[str, Any], candidates: Sequence[Ids]) -> np.ndarray:
    """Returns our scores `[C]` of the candidates of one question."""
    plan = make_plan([candidates])
    made = pair_logprobs(twins.ours, twins.params, batch, plan.chunks)
    return score(plan, jax.device_get(made), length_normalise=False)[0]


def sums(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns scores `[C]`: log-probabilities summed over targets `[C, U]` that are not -100."""
    chances = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return chances.masked_fill(targets == -100, 0.0).sum(-1)


def targets_of(candidates: Sequence[Ids]) -> torch.Tensor:
    """Returns the candidates as ids `[C, U]`, padded with -100."""
    longest = max(map(len, candidates))
    return torch.tensor([[*ids, *[-100] * (longest - len(ids))] for ids in candidates])


@torch.inference_mode()
def their_scores(
    twins: Twins,
    given: dict[str, torch.Tensor],
    candidates: Sequence[Ids],
    batch: int,
    threads: int,
) -> np.ndarray:
    """Returns transformers' scores `[C]` for one question; image and T5 prompt are encoded once."""
    torch.set_num_threads(threads)
    model, targets = twins.theirs, targets_of(candidates)
    features = model.get_image_features(
        given["pixel_values"],
        qformer_input_ids=given["qformer_input_ids"],
        qformer_attention_mask=given["qformer_attention_mask"],
        return_dict=True,
    ).pooler_output
    row = model.get_input_embeddings()(given["input_ids"])
    row[:, : features.shape[1]] = features
    language, parts = model.language_model, []
    if twins.variant.llm.kind == "t5":
        encoded = language.encoder(inputs_embeds=row, attention_mask=given["attention_mask"])[0]
    for part in targets.split(batch):
        count = len(part)
        if twins.variant.llm.kind == "t5":
            out = language(
                encoder_outputs=BaseModelOutput(encoded.expand(count, -1, -1)),
                attention_mask=given["attention_mask"].expand(count, -1),
                labels=part,
            )
            parts.append(sums(out.logits, part))
            continue
        tail = model.get_input_embeddings()(part.clamp(min=0))
        out = language(
            inputs_embeds=torch.cat([row.expand(count, -1, -1), tail], dim=1),
            attention_mask=torch.cat(
                [given["attention_mask"].expand(count, -1), (part != -100).long()], dim=1
            ),
            logits_to_keep=part.shape[1] + 1,
            use_cache=False,
        )
        parts.append(sums(out.logits[:, :-1], part))
    return torch.cat(parts).numpy()


@torch.inference_mode()
def their_forward(
    twins: Twins,
    given: dict[str, torch.Tensor],
    candidates: Sequence[Ids],
    batch: int,
    threads: int,
) -> np.ndarray:
    """Returns transformers' scores `[C]` for one question by `forward`, without any sharing."""
    torch.set_num_threads(threads)
    parts = []
    for part in targets_of(candidates).split(batch):
        rows = {name: leaf.expand(len(part), *leaf.shape[1:]) for name, leaf in given.items()}
        if twins.variant.llm.kind == "t5":
            parts.append(sums(twins.theirs(**rows, labels=part).logits, part))
            continue
        start = rows["input_ids"].shape[1]
        rows["input_ids"] = torch.cat([rows["input_ids"], part.clamp(min=0)], dim=1)
        rows["attention_mask"] = torch.cat([rows["attention_mask"], (part != -100).long()], dim=1)
        parts.append(sums(twins.theirs(**rows).logits[:, start - 1 : -1], part))
    return torch.cat(parts).numpy()


def exact_scores(
    twins: Twins, given: dict[str, torch.Tensor], candidates: Sequence[Ids]
) -> np.ndarray:
    """Returns transformers' scores `[C]` in float64."""
    wide = {
        name: leaf.double() if leaf.is_floating_point() else leaf for name, leaf in given.items()
    }
    twins = twins._replace(theirs=copy.deepcopy(twins.theirs).double())
    return their_scores(twins, wide, candidates, BATCHES[0], THREADS[0])


def ours_of(twins: Twins, batch: dict[str, Any], candidates: Sequence[Ids], repeats: int) -> dict:
    """Returns our median seconds per question, with the number of candidates and inner tokens.

    Inner tokens are the distinct proper prefixes of the candidates.
    """
    run = lambda: our_scores(twins, batch, candidates)
    run()
    found = sorted((measure(run) for _ in range(repeats)), key=lambda each: each.wall)
    inner = len({ids[:depth] for ids in candidates for depth in range(1, len(ids))})
    sizes = {"candidates": len(candidates), "inner_tokens": inner}
    return sizes | described(found[repeats // 2])


def described(measured: Measured) -> dict[str, float]:
    """Returns the fields of one measurement for the JSON file."""
    return {
        "seconds": round(measured.wall, 4),
        "processor_seconds": round(measured.own, 4),
        "cores_of_other_processes": round(measured.others, 2),
    }


def compare(name: str, count: int, repeats: int) -> dict[str, Any]:
    """Returns seconds per question of this package and transformers, and score differences.

    Also our seconds for other numbers of candidates and prompt lengths, as `growth`.
    """
    twins, lengths = make_twins(name), Lengths()
    given, batch = questions(twins.variant, 1, lengths)
    words = twins.variant.llm.vocab - 2
    candidates = draw_candidates(twins, count, words)
    some = candidates[: BATCHES[-1]]
    ways = list(itertools.product(BATCHES, THREADS))
    attempt = lambda way: measure(lambda: their_scores(twins, given, some, *way)).wall
    size, threads = min(ways, key=attempt)
    ours = ours_of(twins, batch, candidates, repeats)
    few, boxes = candidates[: max(count // 10, 1)], []
    theirs = measure(lambda: boxes.append(their_scores(twins, given, candidates, size, threads)))
    forward = measure(lambda: boxes.append(their_forward(twins, given, few, size, threads)))
    exact = exact_scores(twins, given, some)
    off = lambda scores: float(np.abs(scores[: len(some)] - exact).max())
    found, scaled = our_scores(twins, batch, candidates), forward.wall * count / len(few)
    row: dict[str, Any] = {
        "ours": ours,
        "theirs": {"batch": size, "threads": threads} | described(theirs),
        "their_forward": {"candidates": len(few)} | described(forward),
        "ratio": round(theirs.wall / ours["seconds"], 2),
        "ratio_of_processor_seconds": round(theirs.own / ours["processor_seconds"], 2),
        "ratio_forward": round(scaled / ours["seconds"], 2),
        "ratio_forward_of_processor_seconds": round(
            forward.own * count / len(few) / ours["processor_seconds"], 2
        ),
        "largest_score": float(np.abs(found).max()),
        "largest_difference": float(np.abs(found - boxes[0]).max()),
        "largest_difference_forward": float(np.abs(found[: len(few)] - boxes[-1]).max()),
        "our_error": off(found),
        "their_error": off(boxes[0]),
        "same_order": bool((np.argsort(-found) == np.argsort(-boxes[0])).all()),
    }
    growth = [
        {"words": limit, "prompt": lengths.prompt}
        | ours_of(twins, batch, draw_candidates(twins, number, limit), repeats)
        for number, limit in [(n, words) for n in COUNTS] + [(count, 100), (count, 1000)]
    ]
    worst = draw_candidates(twins, count, words, even=True)
    row["ours_of_distinct_beginnings"] = ours_of(twins, batch, worst, repeats)
    for length in PROMPTS:
        longer = questions(twins.variant, 1, Lengths(prompt=length))[1]
        growth.append(
            {"words": words, "prompt": length} | ours_of(twins, longer, candidates, repeats)
        )
    return row | {"growth": growth}


COUNTS = (1, 250, 500, 1000, 2000)


def main() -> None:
    """Measures all variants, prints the results and writes them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="*", default=[*VARIANTS["tiny"], *MIDDLE])
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    flags = parser.parse_args()
    document = facts("ranking", sys.argv[1:])
    document |= {"dtype": "float32", "lengths": vars(Lengths()), "results": {}}
    for name in flags.variants:
        start = time.perf_counter()
        found = document["results"][name] = compare(name, flags.candidates, flags.repeats)
        for key, value in found.items():
            for each in value if isinstance(value, list) else [value]:
                print(f"{name} {key}: {each}")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        if flags.out:
            flags.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
