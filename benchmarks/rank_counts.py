"""Products of ranking by part: ours, those that no exact score can do without, and transformers'.

python -m benchmarks.rank_counts [--only TEXT]

Counted on shapes, for the candidates and the question of the suite `rank`; nothing is computed, so
that the released models are counted as well. Writes `results/rank_counts.json`, in GFLOP:

    ours            of the programs, padding included: `prompt` (image, prompt, first token),
                    `decoder`, `head`
    needed          each distinct beginning once through decoder and head, nothing padded
    fewest          the least for as many candidates of T5: each ends in eos, so that it is a
                    beginning itself, even if it shared all shorter ones
    behind_image    transformers, image and T5's encoder run once: a row for each candidate, padded
                    to the longest; T5 makes keys and values of the prompt for each row, LLaMA reads
                    the prompt in each row
    forward         transformers' `forward`, which reads the image for each candidate as well
"""

import argparse
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.ranking import draw_candidates
from benchmarks.workload import Lengths, Questions, facts, variant_of
from jax_instructblip.atomic import write_file
from jax_instructblip.inference.ranking import make_plan, tree_logprobs
from jax_instructblip.models import flops
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.variants import T5Config, Variant
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes, unstack_decoder

RESULT = pathlib.Path(__file__).parent / "results" / "rank_counts.json"
CASES = (
    ("middle-t5", 1_000),
    ("middle-vicuna", 1_000),
    ("instructblip-flan-t5-xl", 1_000),
    ("instructblip-flan-t5-xl", 2_500),
    ("instructblip-vicuna-7b", 1_000),
)


def ours(variant: Variant, candidates: list[tuple[int, ...]]) -> dict[str, int]:
    """Returns the FLOPs of our programs by part; `candidates` are token ids."""
    from benchmarks.ours import question_batch

    model = VisionLanguageModel(variant, jnp.float32, Scans(llm=Scan(unstacked=True)))
    params = jax.eval_shape(functools.partial(unstack_decoder, variant), param_shapes(variant))
    batch = question_batch(variant, Questions.draw(variant, 1, Lengths()))
    prefill = lambda params, batch: model.apply({"params": params}, batch, 0, method="prefill")
    made = jax.eval_shape(prefill, params, batch)
    parts = {"prompt": flops.counted(prefill, params, batch)[0], "decoder": 0, "head": 0}
    for chunk in make_plan([candidates]).chunks:
        rank = functools.partial(tree_logprobs, model)
        jaxpr = jax.make_jaxpr(rank)(params, *made, chunk).jaxpr
        for equation, times in flops.products(jaxpr):
            head = "/head" in str(equation.source_info.name_stack)
            parts["head" if head else "decoder"] += times * flops.flops_of(equation)
    return parts


def counts(variant: Variant, candidates: list[tuple[int, ...]]) -> dict[str, Any]:
    """Returns the FLOPs of ranking `candidates` (token ids) by each method listed above."""
    config: Any = variant.llm
    lengths, count, longest = Lengths(), len(candidates), max(map(len, candidates))
    prompt = variant.visual_tokens + lengths.prompt
    first, second = (
        flops.generation(variant, 1, lengths.instruction, lengths.prompt, new) for new in (1, 2)
    )
    token, head = second - first, flops.linear(1, config.width, config.vocab)
    beginnings = len({ids[:depth] for ids in candidates for depth in range(1, len(ids))})
    parts = ours(variant, candidates)
    found = {"beginnings": beginnings, "ours": sum(parts.values()), "of_ours": parts}
    found["needed"] = first + beginnings * token
    if isinstance(config, T5Config):
        inner = config.heads * config.head_width
        again = flops.linear(prompt, config.decoder_layers * 2 * config.width * inner)
        rows = count * longest * token
        found["fewest"] = first + count * token
        found["behind_image"] = first - token - again + count * again + rows
        found["forward"] = count * (first - token) + rows
    else:
        layers, seen = token - head, first - head - prompt * (token - head)
        rows = count * (prompt + longest) * layers
        found["behind_image"] = seen + rows + count * (longest + 1) * head
        found["forward"] = count * seen + rows + count * (prompt + longest) * head
    return found


def main() -> None:
    """Counts, writes and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="counts the cases whose name has this text")
    flags = parser.parse_args()
    document = facts("rank_counts", []) | {"unit": "GFLOP", "cases": {}}
    for name, count in CASES:
        title = f"{name}, {count:,} candidates"
        if flags.only not in title:
            continue
        variant = variant_of(name)
        found = counts(variant, draw_candidates(variant, count))
        scaled = jax.tree.map(lambda number: round(number / 1e9, 2), found)
        document["cases"][title] = scaled | {
            "beginnings": found["beginnings"],
            "ratio": round(found["behind_image"] / found["ours"], 2),
            "largest_ratio": round(found["behind_image"] / found["needed"], 2),
        }
        print(title, json.dumps(document["cases"][title]), flush=True)
    if not flags.only:
        write_file(RESULT, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
