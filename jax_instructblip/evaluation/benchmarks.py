"""What can be evaluated by name: the split, the metric, and what the paper reports of it.

    PAPER["nocaps"] -> {"instructblip-flan-t5-xl": 119.9, ...}

Prompts and decode settings are those of the preset of the same name (`inference/presets.py`).
"""

import dataclasses
from collections.abc import Mapping

from jax_instructblip import tables
from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.inference.presets import get_preset
from jax_instructblip.models.variants import VARIANTS, Variant

# InstructBLIP (arXiv 2305.06500), table 1: zero-shot results, in percent.
MODELS = (
    "instructblip-flan-t5-xl",
    "instructblip-flan-t5-xxl",
    "instructblip-vicuna-7b",
    "instructblip-vicuna-13b",
)
_TABLE = {
    "nocaps": (119.9, 120.0, 123.1, 121.9),
    "flickr30k": (84.5, 83.5, 82.4, 82.8),
    "gqa": (48.4, 47.9, 49.2, 49.5),
    "vsr": (64.8, 65.6, 54.3, 52.1),
    "iconqa": (50.0, 51.2, 43.1, 44.8),
    "textvqa": (46.6, 46.6, 50.1, 50.7),
    "visual_dialog": (46.6, 48.5, 45.2, 45.4),
    "hateful_memes": (56.6, 54.1, 59.6, 57.5),
    "vizwiz": (32.7, 30.9, 34.5, 33.4),
    "scienceqa": (70.4, 70.6, 60.5, 63.1),
    "msvd_qa": (43.4, 44.3, 41.8, 41.2),
    "msrvtt_qa": (25.0, 25.6, 22.1, 24.8),
    "ivqa": (53.1, 53.8, 52.2, 51.0),
}
PAPER: dict[str, dict[str, float]] = {
    name: dict(zip(MODELS, row, strict=True)) for name, row in _TABLE.items()
}

# The split that is evaluated where none is named. What the paper scored elsewhere, or is not known
# to have scored, stands in `_NOTES`.
_SPLITS = {
    **{"coco_caption": "test", "nocaps": "val", "flickr30k": "test", "textcaps": "val"},
    **{"gqa": "testdev", "vsr": "test", "iconqa": "test", "vqav2": "val", "vizwiz": "val"},
    **{"okvqa": "val", "aokvqa": "val", "scienceqa": "test", "textvqa": "val", "ocrvqa": "test"},
    **{"msvd_qa": "test", "msrvtt_qa": "test", "ivqa": "test", "visual_dialog": "val"},
    **{"hateful_memes": "val"},
}
_NOTES = {
    "vizwiz": "The paper scored test-dev on the server, whose answers are not public.",
    "vsr": "The size of the paper's test set is not known.",
    "visual_dialog": "Whether the paper scored all ten rounds or the last is not known.",
    "hateful_memes": "On which split the paper scored is not known.",
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One thing to evaluate.

    Attributes:
      name: what flags, files and results call it, and the name of its preset.
      dataset: the row of the table of datasets that its records come from.
      split: what is evaluated unless another is named; "" where there is no usual one.
      metric: a name of `metrics.METRICS`; "" where nothing is scored.
      paper: what InstructBLIP reports, in percent, by the names of its models.
      notes: how far the paper's number is known to be of the same thing.
    """

    name: str
    dataset: str
    split: str = ""
    metric: str = ""
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: str = ""


BENCHMARKS: dict[str, Benchmark] = {
    **{
        name: Benchmark(
            name,
            name,
            _SPLITS.get(name, ""),
            dataset.metric,
            PAPER.get(name, {}),
            _NOTES.get(name, ""),
        )
        for name, dataset in DATASETS.items()
    },
    "aokvqa_choices": Benchmark("aokvqa_choices", "aokvqa", "val", "accuracy"),
}
HELD_OUT = tuple(_TABLE)  # what `--datasets held_out` stands for


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name; a ValueError with those spelled alike where there is none."""
    return tables.find(BENCHMARKS, name, "dataset")


def table() -> str:
    """All benchmarks for people: what is asked of which split, how it is answered and scored."""
    lines = []
    for name, benchmark in BENCHMARKS.items():
        preset = get_preset(name)
        how = "ranked" if preset.ranking else "generated"
        scored = f"scored by {benchmark.metric}" if benchmark.metric else "not scored"
        lines.append(f"{name}: {benchmark.split or 'any split'}, {how}, {scored}")
        lines.append(f"  prompt: {preset.prompt!r}")
        settings = {kind: preset.settings(kind) for kind in ("t5", "llama")}
        for kind, values in settings.items():
            if kind == "t5" or values != settings["t5"]:
                said = ", ".join(f"{field} {value}" for field, value in values.items())
                lines.append(f"  {'settings' if kind == 't5' else 'with a LLaMA'}: {said}")
        if benchmark.paper:
            numbers = ", ".join(f"{model} {value}" for model, value in benchmark.paper.items())
            lines.append(f"  paper: {numbers}")
        lines += [f"  note: {note}" for note in (preset.notes, benchmark.notes) if note]
    return "\n".join(lines)


def paper_model(variant: Variant) -> str:
    """Which of the paper's models has these sizes; "" for none."""

    def sizes(variant: Variant) -> tuple[object, ...]:
        llm, qformer, vision = variant.llm, variant.qformer, variant.vision
        depth = getattr(llm, "layers", 0) or getattr(llm, "encoder_layers", 0)
        return (llm.kind, llm.width, depth, qformer.width, qformer.layers, qformer.queries) + (
            *(vision.width, vision.layers, qformer.instruction_aware),
        )

    return next((name for name in MODELS if sizes(VARIANTS[name]) == sizes(variant)), "")
