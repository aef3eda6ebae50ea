"""All benchmarks by name, and the protocol of each for a kind of checkpoint.

get_benchmark("gqa", "blip2").prompts        -> {"opt": "Question: {question} Answer:"}
get_benchmark("coco_retrieval", "blip2_stage1").k    -> 128
"""

import dataclasses
from collections.abc import Mapping

from jax_instructblip import lookup
from jax_instructblip.evaluation.blip2_protocols import RETRIEVAL, second_stage_rows
from jax_instructblip.evaluation.llava_protocols import ADDED, llava_rows
from jax_instructblip.evaluation.protocol import BENCHMARKS, PROTOCOLS, Protocol, table

INSTRUCTBLIP: dict[str, Protocol] = BENCHMARKS | ADDED
BY_KIND: Mapping[str, Mapping[str, Protocol]] = {
    "instructblip": INSTRUCTBLIP,
    "blip2": second_stage_rows(INSTRUCTBLIP),
    "blip2_stage1": RETRIEVAL,
    "llava": llava_rows(INSTRUCTBLIP),
}
NAMES = (*INSTRUCTBLIP, *RETRIEVAL)
_TITLES = {"blip2": "a second stage of BLIP-2", "llava": "LLaVA"}


def get_benchmark(name: str, kind: str = "instructblip") -> Protocol:
    """Returns the protocol of a benchmark for checkpoints of a kind (`variant.kind`).

    `name` is one of `NAMES`, `kind` a key of `BY_KIND`.

    Raises:
      ValueError: no benchmark has that name, or it is only for checkpoints of another kind.
    """
    rows = BY_KIND[kind]
    if name in NAMES and name not in rows:
        raise ValueError(f"{name} {_other_kind(name in RETRIEVAL, kind)}")
    return lookup.find(rows, name, "dataset")


def _other_kind(retrieval: bool, kind: str) -> str:
    if retrieval:
        return (
            f"compares images with captions, and the checkpoint is of kind {kind}, which answers: "
            "give a first stage of BLIP-2 (blip2-itm-vit-g-coco, or a run of "
            "configs/blip2_stage1.py)"
        )
    return (
        "asks about images, and the checkpoint is a first stage of BLIP-2, which compares images "
        f"and texts and answers nothing: measure it on {' or '.join(RETRIEVAL)}, or give a model "
        "that answers"
    )


def full_table() -> str:
    """Returns a printable table of all protocols; of other kinds only the rows that differ."""
    parts = [table(PROTOCOLS | ADDED), "", "of a first stage of BLIP-2:", "", table(RETRIEVAL)]
    for kind, title in _TITLES.items():
        others = {
            name: row
            for name, row in BY_KIND[kind].items()
            if row != dataclasses.replace(INSTRUCTBLIP[name], notes=row.notes)
        }
        parts += ["", f"of {title}:", "", table(others)]
    return "\n".join(parts)
