"""BLIP-2's protocols: retrieval of its first stage, and the prompts of its second.

A second stage is asked GQA as in BLIP-2's paper (arXiv 2301.12597, section 4), an InstructBLIP
model as in InstructBLIP's paper; `by_kind.py` joins the rows of all kinds.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_instructblip.evaluation.protocol import BENCHMARKS, HELD_OUT, Protocol
from jax_instructblip.inference.generation_config import GenerationConfig

# InstructBLIP (arXiv 2305.06500), table 1, of BLIP-2: zero-shot, in the order of `HELD_OUT`.
_TABLE_1 = {
    "blip2-flan-t5-xl": (
        *(104.5, 76.1, 44.0, 60.5, 45.5, 43.1, 45.7, 53.0, 29.8, 54.9, 33.7, 16.2, 40.4),
    ),
    "blip2-flan-t5-xxl": (
        *(98.4, 73.7, 44.6, 68.2, 45.4, 44.1, 46.9, 52.0, 29.4, 64.5, 34.4, 17.4, 45.8),
    ),
    "blip2-vicuna-7b": (
        *(107.5, 74.9, 38.6, 50.0, 39.7, 40.1, 44.9, 50.6, 25.3, 53.8, 18.3, 9.2, 27.5),
    ),
    "blip2-vicuna-13b": (
        *(103.9, 71.6, 41.0, 50.9, 40.6, 42.5, 45.1, 53.7, 19.6, 61.0, 20.3, 10.3, 23.5),
    ),
}
# BLIP-2, table 2: zero-shot VQAv2 (val), OK-VQA (test), GQA (test-dev).
_TABLE_2 = {
    "blip2-opt-2.7b": {"vqav2": 53.5, "okvqa": 31.7, "gqa": 34.6},
    "blip2-opt-6.7b": {"vqav2": 54.3, "okvqa": 36.4, "gqa": 36.4},
    "blip2-flan-t5-xl": {"vqav2": 63.1, "okvqa": 40.7, "gqa": 44.2},
    "blip2-flan-t5-xl-vit-l": {"vqav2": 62.6, "okvqa": 39.4, "gqa": 44.4},
    "blip2-flan-t5-xxl": {"vqav2": 65.2, "okvqa": 45.9, "gqa": 44.7},
}
# Table 3, of models fine-tuned on COCO captions: CIDEr of NoCaps (val), and of COCO's test.
_DOMAINS = ("cider/in-domain", "cider/near-domain", "cider/out-domain")
_TABLE_3 = {
    "blip2-opt-2.7b-coco": ((123.0, 117.8, 123.4), 119.7, 145.8),
    "blip2-opt-6.7b-coco": ((123.7, 119.2, 124.4), 121.0, 145.2),
    "blip2-flan-t5-xl-coco": ((123.7, 120.2, 124.8), 121.6, 144.5),
}
# Table 5, of the first stage fine-tuned on COCO: R@1, R@5, R@10 of texts, then of images.
_RECALLS = tuple(
    f"{way}/r{rank}" for way in ("image_to_text", "text_to_image") for rank in (1, 5, 10)
)
_TABLE_5 = {
    "coco_retrieval": (85.4, 97.0, 98.5, 68.3, 87.7, 92.6),
    "flickr30k_retrieval": (97.6, 100.0, 100.0, 89.7, 98.1, 98.9),
}

_QUESTION = BENCHMARKS["gqa"].prompt
_ASKED: dict[str, Any] = {
    "prompts": {"opt": "Question: {question} Answer:"},
    "decoding": GenerationConfig(num_beams=5, length_penalty=-1.0, max_new_tokens=10),
    "llama": {},
}
# The released configurations for captions say 8 to 30 ids, one of which precedes the new tokens.
_CAPTIONED: dict[str, Any] = {
    "prompt": "a photo of",
    "decoding": GenerationConfig(num_beams=5, max_new_tokens=30, min_new_tokens=7),
    "llama": {"max_new_tokens": 29},
}
_NOTES = {
    "vqav2": "The released code gives OPT a length penalty of 0, the paper all models one of -1.",
    "gqa": "FlanT5: the paper of BLIP-2; that of InstructBLIP says 44.0 (XL) and 44.6 (XXL).",
    "okvqa": "The released evaluation lemmatises answers (spaCy); here they stay as they are.",
    "nocaps": "Numbers of 224 pixels are InstructBLIP's of models never tuned on captions; those "
    "of COCO are of models tuned there, at 364 pixels, and have domains.",
}


def _paper(name: str) -> dict[str, float]:
    """Published numbers of one benchmark, by model; BLIP-2's paper overrules InstructBLIP's."""
    numbers: dict[str, float] = {}
    if name in HELD_OUT:
        place = HELD_OUT.index(name)
        numbers |= {model: row[place] for model, row in _TABLE_1.items()}
    numbers |= {model: row[name] for model, row in _TABLE_2.items() if name in row}
    if name in ("nocaps", "coco_caption"):
        numbers |= {
            model: overall if name == "nocaps" else coco
            for model, (_, overall, coco) in _TABLE_3.items()
        }
    return numbers


def _row(protocol: Protocol) -> Protocol:
    """The row for BLIP-2's second stage, from the row for InstructBLIP."""
    name, changes = protocol.name, {}
    if protocol.prompt == _QUESTION:
        changes = {"prompts": _ASKED["prompts"]} if protocol.ranking else _ASKED
    elif protocol.prompt == BENCHMARKS["nocaps"].prompt:
        changes = _CAPTIONED
    notes = protocol.notes + ((_NOTES[name],) if name in _NOTES else ())
    values = {}
    if name == "nocaps":
        values = {m: dict(zip(_DOMAINS, row[0], strict=True)) for m, row in _TABLE_3.items()}
    return dataclasses.replace(
        protocol, paper=_paper(name), paper_values=values, notes=notes, **changes
    )


def _retrieval(name: str, dataset: str, *notes: str) -> Protocol:
    values = dict(zip(_RECALLS, _TABLE_5[name], strict=True))
    model = "blip2-stage1-coco"
    return Protocol(
        name,
        "",
        dataset=dataset,
        split="test",
        metric="recall",
        retrieval=True,
        k=128,
        paper={model: values[_RECALLS[0]]},
        paper_values={model: values},
        notes=(
            *notes,
            "The released evaluation writes captions in lower case, without marks: "
            "--text_processor lavis.",
        ),
    )


def second_stage_rows(rows: Mapping[str, Protocol]) -> dict[str, Protocol]:
    """Returns the rows for BLIP-2's second stage, by name, from those for InstructBLIP."""
    return {name: _row(row) for name, row in rows.items()}


RETRIEVAL: dict[str, Protocol] = {
    row.name: row
    for row in (
        _retrieval("coco_retrieval", "coco_caption"),
        _retrieval(
            "flickr30k_retrieval", "flickr30k", "Zero-shot: the model was tuned on COCO alone."
        ),
    )
}
