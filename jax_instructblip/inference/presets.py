"""Prompts and decode settings by name: the paper's for each dataset, and four for every day.

    preset = get_preset("caption")
    blip.generate(images, [preset.prompt], **preset.settings(blip.variant.llm.kind))

What the published figures were decoded with is partly code, not paper: the released tasks do not
hand on every value of their configurations. A row says what reached the model. Lengths are new
tokens; the released code counts one id more, which stands before them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_instructblip import tables
from jax_instructblip.data import templates
from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.inference.generation_config import GenerationConfig, LengthRule

GENERATE = (
    *("num_beams", "length_penalty", "repetition_penalty"),
    *("max_new_tokens", "min_new_tokens", "length_rule"),
)
RANK = ("length_normalise",)


@dataclasses.dataclass(frozen=True)
class Preset:
    """One way to ask: data, not code.

    Attributes:
      name: what `get_preset` finds it by.
      dataset: of the table of datasets, whose evaluation prompt is asked; "" with `template`.
      template: the prompt of a preset without a dataset; placeholders as in `templates.dress`.
      ranking: whether an answer is chosen among candidates (`blip.rank`) or generated.
      words: of a ranking, for each of the record's choices the words that stand for it; () where
        the choices themselves are ranked.
      num_beams: and the next five, as in `blip.generate`.
      llama: of those the ones that differ with a LLaMA.
      length_normalise: as in `blip.rank`.
      notes: what is not known, or not as it seems.
    """

    name: str
    dataset: str = ""
    template: str = ""
    ranking: bool = False
    words: tuple[tuple[str, ...], ...] = ()
    num_beams: int = 5
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 30
    min_new_tokens: int = 0
    length_rule: LengthRule = "released"
    llama: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    length_normalise: bool = False
    notes: str = ""

    @property
    def prompt(self) -> str:
        """The prompt, with placeholders where a record's texts go (`templates.dress`)."""
        return DATASETS[self.dataset].prompt if self.dataset else self.template

    def settings(self, llm: str = "t5") -> dict[str, Any]:
        """Keyword arguments of `blip.generate`, or of `blip.rank` if `ranking`.

        `llm` is the kind of the language model, `blip.variant.llm.kind`.
        """
        names = RANK if self.ranking else GENERATE
        differing = self.llama if llm == "llama" else {}
        settings = {name: differing.get(name, getattr(self, name)) for name in names}
        if not self.ranking:
            GenerationConfig.of(**settings)  # refuses what cannot be
        return settings


# The configurations of the released code, as they reach `generate`: of captioning all of it; of
# questions no length penalty, for which `predict_answers` has a default of its own, -1 with T5 and
# 0 with LLaMA, and no repetition penalty, whose default is `generate`'s.
_CAPTION: dict[str, Any] = {
    **{"num_beams": 5, "length_penalty": 1.0, "repetition_penalty": 1.15},
    **{"max_new_tokens": 80, "min_new_tokens": 9, "llama": {"max_new_tokens": 79}},
}
_SHORT: dict[str, Any] = {
    **{"num_beams": 5, "length_penalty": -1.0, "repetition_penalty": 1.5, "max_new_tokens": 10},
    "llama": {"length_penalty": 0.0, "max_new_tokens": 9},
}
_LONG: dict[str, Any] = {  # the defaults of `generate`
    **{"num_beams": 5, "length_penalty": 1.0, "repetition_penalty": 1.5, "max_new_tokens": 256},
    "llama": {"max_new_tokens": 255},
}

_DECODING = {
    "image captioning": _CAPTION,
    "captioning with reading comprehension": _CAPTION,
    "image question generation": _LONG,
    "LLaVA-Instruct-150K": _LONG,
}  # others: _SHORT

_MORE: dict[str, dict[str, Any]] = {
    "hateful_memes": {
        "words": (("yes", "true"), ("no", "false")),
        "notes": "How one score was made of the four words is not known.",
    },
    "msvd_qa": {"notes": "Ranked over `read_candidates`; the released code generates."},
    "msrvtt_qa": {"notes": "Ranked over `read_candidates`; the released code generates."},
    "scienceqa": {"notes": "Whether texts or letters were ranked is not known."},
    "vsr": {"notes": "Whether the paper generated is not known; users rank yes, true, no, false."},
}
_UNSCORED = "The paper does not score it."


def _of_dataset(dataset: Dataset) -> Preset:
    fields = {"ranking": True} if dataset.ranking else _DECODING.get(dataset.family, _SHORT)
    more = _MORE.get(dataset.name, {"notes": "" if dataset.metric else _UNSCORED})
    return Preset(dataset.name, dataset=dataset.name, **fields, **more)


_ROWS = (
    Preset("caption", dataset="coco_caption", **_CAPTION),
    Preset("vqa_short", dataset="vqav2", **_SHORT),
    Preset("describe", template="Write a detailed description.", **_LONG),
    Preset("rank", template="{question}", ranking=True),
    *(_of_dataset(dataset) for dataset in DATASETS.values()),
    Preset(
        "aokvqa_choices",
        template=templates.CHOICE[0],
        ranking=True,
        notes="Multiple choice; the prompt is that of training, as the paper gives none.",
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ROWS}


def get_preset(name: str) -> Preset:
    """The preset of that name; a ValueError with those spelled alike where there is none."""
    return tables.find(PRESETS, name, "preset")


def table() -> str:
    """All presets for people: prompt, settings, and how they differ with a LLaMA."""
    lines = []
    for preset in PRESETS.values():
        lines.append(f"{preset.name}: {'ranked' if preset.ranking else 'generated'}")
        lines.append(f"  prompt: {preset.prompt!r}")
        lines.append(f"  settings: {_listed(preset.settings())}")
        if preset.llama:
            lines.append(f"  with a LLaMA: {_listed(preset.llama)}")
        if preset.words:
            lines.append(f"  ranked: {'; '.join(' or '.join(words) for words in preset.words)}")
        if preset.notes:
            lines.append(f"  note: {preset.notes}")
    return "\n".join(lines)


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
