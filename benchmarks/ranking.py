"""The suite `rank`: scores of many candidates of one question.

transformers           candidates as the released `predict_class` scores them: the image, and
for T5 the encoder, run once; each candidate is a row of its own, for
LLaMA behind a copy of the prompt; logits are computed for the
candidate's tokens alone. Batch and threads are the fastest of those
tried. This is the harder rival.
transformers_forward   the model's own `forward` on image, prompt and candidate, for a tenth of
the candidates; its seconds are scaled to all of them.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.sides import Built, Case
from benchmarks.workload import SIZES, THREADS, Lengths, Questions, measure, variant_of
from jax_instructblip.models.variants import Variant

Ids = tuple[int, ...]
BATCHES = (16, 64)  # candidates a batch that are tried for transformers


def cases(sizes: str) -> list[Case]:
    """Returns the cases of a size of models, a key of `workload.SIZES`."""
    return [{"variant": name, "candidates": 1_000} for name in SIZES[sizes]]


def draw_candidates(variant: Variant, count: int) -> list[Ids]:
    """Returns `count` distinct random candidates of 2 to 4 tokens; T5's end with eos.

    Few ids are frequent and many rare, as words are (the logarithm of the id is uniform), so that
    some candidates share a prefix.
    """
    rng, found, llm = np.random.default_rng(0), {}, variant.llm
    words = llm.vocab - 2
    while len(found) < count:
        size = rng.integers(2, 5) - (llm.kind == "t5")
        ids = 2 + np.exp(rng.uniform(0, np.log(words - 3), size)).astype(int)
        found[tuple(ids.tolist() + [llm.eos_id] * (llm.kind == "t5"))] = None
    return list(found)


def ours(case: Case) -> Built:
    """Returns our side, whose call returns the scores `[C]`."""
    import jax

    from benchmarks.ours import device_peak, load, question_batch
    from jax_instructblip.inference.ranking import make_plan, pair_logprobs, score

    model, params = load(case, unstacked=True)
    candidates = draw_candidates(model.variant, case["candidates"])
    batch = question_batch(model.variant, Questions.draw(model.variant, 1, Lengths()))

    def call() -> list[float]:
        plan = make_plan([candidates])
        made = pair_logprobs(model, params, batch, plan.chunks)
        return score(plan, jax.device_get(made), length_normalise=False)[0].tolist()

    prefixes = {ids[:depth] for ids in candidates for depth in range(1, len(ids))}
    return Built(call, facts(case) | {"prefixes": len(prefixes)}, device_peak)


def transformers(case: Case) -> Built:
    """Returns the side of transformers behind one encoded image; a call returns scores `[C]`."""
    return _theirs(case, _behind_one_image, 1)


def forward(case: Case) -> Built:
    """Returns the side of transformers' `forward`; a call scores a tenth of the candidates."""
    return _theirs(case, _forward, 10)


def _theirs(case: Case, score: Callable[..., list[float]], part: int) -> Built:
    """Returns the scores of the first of `part` parts of the candidates, in the fastest setting."""
    import torch

    from benchmarks import theirs

    variant, model = variant_of(case["variant"]), theirs.load(case)
    asked = Questions.draw(variant, 1, Lengths())
    given = theirs.question_inputs(variant, asked, getattr(torch, case["dtype"]))
    candidates = draw_candidates(variant, case["candidates"])[: case["candidates"] // part]
    on_gpu = theirs.device().type == "cuda"

    @torch.inference_mode()
    def run(batch: int, threads: int, chosen: Sequence[Ids]) -> list[float]:
        torch.set_num_threads(threads)
        longest = max(map(len, chosen))
        rows = [[*ids, *[-100] * (longest - len(ids))] for ids in chosen]
        targets = torch.tensor(rows, device=theirs.device())
        return score(model, variant, given, targets, batch)

    ways = [*itertools.product(BATCHES, THREADS[:1] if on_gpu else THREADS)]
    some = candidates[: BATCHES[-1]]
    run(*ways[0], some)
    fastest = min(ways, key=lambda way: measure(functools.partial(run, *way, some)).wall)
    call = functools.partial(run, *fastest, candidates)
    tried = {"batch": fastest[0], "threads": fastest[1], "work": len(candidates)}
    return Built(call, facts(case) | tried, theirs.device_peak if on_gpu else None)


def _sums(logits: Any, targets: Any) -> Any:
    """Returns scores [C]: log-probabilities summed over targets [C, U] that are not -100."""
    chances = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return chances.masked_fill(targets == -100, 0.0).sum(-1)


def _behind_one_image(
    model: Any, variant: Variant, given: dict[str, Any], targets: Any, batch: int
) -> list[float]:
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    features = model.get_image_features(
        given["pixel_values"],
        qformer_input_ids=given["qformer_input_ids"],
        qformer_attention_mask=given["qformer_attention_mask"],
        return_dict=True,
    ).pooler_output
    row = model.get_input_embeddings()(given["input_ids"])
    row[:, : features.shape[1]] = features
    mask, language, parts = given["attention_mask"], model.language_model, []
    encoded = None
    if variant.llm.kind == "t5":
        encoded = language.encoder(inputs_embeds=row, attention_mask=mask)[0]
    for part in targets.split(batch):
        count = len(part)
        if encoded is not None:
            out = language(
                encoder_outputs=BaseModelOutput(encoded.expand(count, -1, -1)),
                attention_mask=mask.expand(count, -1),
                labels=part,
            )
            parts.append(_sums(out.logits, part))
            continue
        tail = model.get_input_embeddings()(part.clamp(min=0))
        out = language(
            inputs_embeds=torch.cat([row.expand(count, -1, -1), tail], dim=1),
            attention_mask=torch.cat([mask.expand(count, -1), (part != -100).long()], dim=1),
            logits_to_keep=part.shape[1] + 1,
            use_cache=False,
        )
        parts.append(_sums(out.logits[:, :-1], part))
    return torch.cat(parts).tolist()


def _forward(
    model: Any, variant: Variant, given: dict[str, Any], targets: Any, batch: int
) -> list[float]:
    import torch

    parts = []
    for part in targets.split(batch):
        rows = {name: leaf.expand(len(part), *leaf.shape[1:]) for name, leaf in given.items()}
        if variant.llm.kind == "t5":
            parts.append(_sums(model(**rows, labels=part).logits, part))
            continue
        start = rows["input_ids"].shape[1]
        rows["input_ids"] = torch.cat([rows["input_ids"], part.clamp(min=0)], dim=1)
        rows["attention_mask"] = torch.cat([rows["attention_mask"], (part != -100).long()], dim=1)
        parts.append(_sums(model(**rows).logits[:, start - 1 : -1], part))
    return torch.cat(parts).tolist()


def facts(case: Case) -> dict[str, Any]:
    """Returns the work of a call: the number of candidates that it scores."""
    return {"work": case["candidates"], "unit": "candidates"}


SIDES = {
    "jax_instructblip": ours,
    "transformers": transformers,
    "transformers_forward": forward,
}
