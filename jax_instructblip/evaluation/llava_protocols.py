r"""LLaVA's protocols: the benchmarks that it is measured on, and its prompts of the others.

A checkpoint of LLaVA is asked a question as it stands, and for a short answer by the sentence
`SHORT_ANSWER` after it; other models are asked LLaVA's benchmarks by their own prompts.

    get_benchmark("gqa", "llava").prompt     -> "{question}\nAnswer the question using a ..."
    get_benchmark("pope", "blip2").prompt    -> "Question: {question} Short answer:"
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_instructblip.evaluation.protocol import BENCHMARKS, Protocol
from jax_instructblip.inference.generation_config import GenerationConfig

SHORT_ANSWER = "Answer the question using a single word or phrase."
_QUESTION = BENCHMARKS["gqa"].prompt
_OPEN = "{question}"  # the question alone
# The released evaluation of LLaVA is greedy; the lengths are those of its scripts.
_SHORT = GenerationConfig(max_new_tokens=128)
_LONG = GenerationConfig(max_new_tokens=1024)
_LLAVA_SHORT: dict[str, Any] = {"prompt": f"{_OPEN}\n{SHORT_ANSWER}", "prompts": {}}

_POPE = ("f1/random", "f1/popular", "f1/adversarial")


def _like(name: str, row: str, **fields: Any) -> Protocol:
    """Returns the row of a new benchmark, asked and answered like the benchmark `row`."""
    fields = {"dataset": name, "split": "test", "paper": {}, "paper_values": {}, **fields}
    return dataclasses.replace(BENCHMARKS[row], name=name, **fields)


ADDED: dict[str, Protocol] = {
    row.name: row
    for row in (
        _like(
            *("scienceqa_qcm", "llava_reasoning"),
            metric="science_qa",
            notes=(
                "An answer names its choice by `The answer is X.`, a letter alone, or `X. `; the "
                "original scorer drew a choice at random where none is named, here it is wrong.",
            ),
        ),
        _like(
            *("pope", "gqa"),
            metric="yes_no",
            paper={"llava-1.5-13b": 85.9},
            paper_values={"llava-1.5-13b": dict(zip(_POPE, (87.1, 86.2, 84.5), strict=True))},
            notes=(
                "Values without a kind are means over the kinds of questions; counts are sums.",
            ),
        ),
        *(
            _like(name, "llava_detail", judged=True, notes=())
            for name in ("llava_bench_coco", "llava_bench_wild")
        ),
    )
}


def _row(protocol: Protocol) -> Protocol:
    """Returns the row for LLaVA, from the row for InstructBLIP."""
    changes: dict[str, Any] = {"decoding": _SHORT, "llama": {}}
    if protocol.prompt == _QUESTION and not protocol.ranking:
        changes |= _LLAVA_SHORT
    elif protocol.prompt == _OPEN:
        changes["decoding"] = _LONG
    return dataclasses.replace(protocol, **changes)


def llava_rows(rows: Mapping[str, Protocol]) -> dict[str, Protocol]:
    """Returns the rows for LLaVA, by name, from those for InstructBLIP."""
    return {name: _row(row) for name, row in rows.items()}
