"""Ranking of many candidates side by side with transformers, on a CPU in float32.

python -m benchmarks.ranking [--variants NAME ...] [--candidates 1000] [--out FILE]

Both sides have the same random weights, question and candidates, of 2 to 4 random tokens (for T5
and eos). `theirs` scores each candidate in batches of the size that is fastest, as the released
`predict_class` does: the image, and for T5 the encoder, once a question; behind them each candidate
in a row of its own, for LLaMA with the prompt, but with logits of the candidate's places alone.
`their_forward` is the model's own `forward` on image, prompt and candidate, on fewer candidates.

`growth` has our seconds for other numbers of candidates and other prompts. `inner_tokens` are what
the model reads behind the prompt: the distinct beginnings of candidates.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.twins import Twins, make_twins, questions
from benchmarks.workload import MIDDLE, VARIANTS, Lengths, facts, measure
from jax_instructblip.inference.ranking import make_plan, pair_logprobs, score

Ids = tuple[int, ...]
BATCHES = (16, 64, 128)  # rows of candidates that transformers is tried with
PROMPTS = (16, 128, 512)  # tokens


def draw_candidates(twins: Twins, count: int, words: int) -> list[Ids]:
    """`count` distinct candidates of 2 to 4 of the first `words` ids."""
    rng, found = np.random.default_rng(0), {}
    t5 = twins.variant.llm.kind == "t5"
    while len(found) < count:
        ids = rng.integers(3, words, rng.integers(2, 5)).tolist()
        found[tuple(ids + [twins.variant.llm.eos_id] * t5)] = None
    return list(found)


def our_scores(twins: Twins, batch: dict[str, Any], candidates: Sequence[Ids]) -> np.ndarray:
    """Scores `[C]` of one question."""
    plan = make_plan([candidates])
    made = pair_logprobs(twins.ours, twins.params, batch, plan.chunks)
    return score(plan, jax.device_get(made), length_normalise=False)[0]


def sums(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Scores of rows: log-probabilities `[C]` summed over targets `[C, U]` that are not -100."""
    chances = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return chances.masked_fill(targets == -100, 0.0).sum(-1)


def targets_of(candidates: Sequence[Ids]) -> torch.Tensor:
    """`[C, U]`, -100 behind the end of a candidate."""
    longest = max(map(len, candidates))
    return torch.tensor([[*ids, *[-100] * (longest - len(ids))] for ids in candidates])


@torch.inference_mode()
def their_scores(
    twins: Twins, given: dict[str, torch.Tensor], candidates: Sequence[Ids], batch: int
) -> np.ndarray:
    """Scores `[C]` of one question, whose image is looked at once; T5 encodes its prompt once."""
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
    twins: Twins, given: dict[str, torch.Tensor], candidates: Sequence[Ids], batch: int
) -> np.ndarray:
    """Scores `[C]` of one question, image and prompt beside each candidate."""
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


def ours_of(twins: Twins, batch: dict[str, Any], candidates: Sequence[Ids], repeats: int) -> dict:
    """Our seconds a question and what grows with them."""
    run = lambda: our_scores(twins, batch, candidates)
    run()
    seconds = statistics.median(measure(run)[0] for _ in range(repeats))
    inner = len({ids[:depth] for ids in candidates for depth in range(1, len(ids))})
    return {"candidates": len(candidates), "inner_tokens": inner, "seconds": round(seconds, 4)}


def compare(name: str, count: int, repeats: int) -> dict[str, Any]:
    """Seconds a question of both sides, how far their scores are apart, and our growth."""
    twins, lengths = make_twins(name), Lengths()
    given, batch = questions(twins.variant, 1, lengths)
    words = twins.variant.llm.vocab - 2
    candidates = draw_candidates(twins, count, words)
    some = candidates[: BATCHES[-1]]
    rates = {
        size: measure(functools.partial(their_scores, twins, given, some, size), tries=1)[0]
        for size in BATCHES
    }
    size = min(rates, key=lambda each: rates[each])
    ours = ours_of(twins, batch, candidates, repeats)
    few, boxes = candidates[: max(count // 10, 1)], []
    whole = lambda: boxes.append(their_scores(twins, given, candidates, size))
    theirs, others = measure(whole, tries=1)
    part = lambda: boxes.append(their_forward(twins, given, few, min(size, 64)))
    forward = measure(part, tries=1)[0]
    found = our_scores(twins, batch, candidates)
    row: dict[str, Any] = {
        "ours": ours,
        "theirs": {"seconds": round(theirs, 3), "batch": size},
        "their_forward": {
            "seconds_for": len(few),
            "seconds": round(forward, 3),
            "seconds_a_question": round(forward * count / len(few), 3),
        },
        "cores_of_other_processes": round(others, 2),
        "ratio": round(theirs / ours["seconds"], 2),
        "ratio_forward": round(forward * count / len(few) / ours["seconds"], 2),
        "largest_difference": float(np.abs(found - boxes[0]).max()),
        "largest_difference_forward": float(np.abs(found[: len(few)] - boxes[-1]).max()),
        "same_order": bool((np.argsort(-found) == np.argsort(-boxes[0])).all()),
    }
    growth = [
        {"words": limit, "prompt": lengths.prompt}
        | ours_of(twins, batch, draw_candidates(twins, number, limit), repeats)
        for number, limit in [(n, words) for n in COUNTS] + [(count, 13), (count, 40)]
    ]
    for length in PROMPTS:
        longer = questions(twins.variant, 1, Lengths(prompt=length))[1]
        growth.append(
            {"words": words, "prompt": length} | ours_of(twins, longer, candidates, repeats)
        )
    return row | {"growth": growth}


COUNTS = (1, 125, 250, 500, 1000, 2000)


def main() -> None:
    """Prints the figures and writes them as JSON."""
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
