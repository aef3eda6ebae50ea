"""The Hugging Face architectures that can be read and written: a row of a table for each.

A row says which section of config.json describes which tower (vision, bridge, language model) and
which table of rules converts the tower's tensors. A new architecture is a new row.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from jax_instructblip.conversion import llama_sections
from jax_instructblip.conversion.config_keys import AXIS, Key, Section
from jax_instructblip.conversion.engine import Entry
from jax_instructblip.conversion.sections import (
    BLIP2_ITM_QFORMER,
    BLIP2_QFORMER,
    CLIP_VIT,
    EVA_VIT,
    OPT,
    PROJECTOR,
    QFORMER,
    T5,
)
from jax_instructblip.conversion.tables import heads, llama, opt, projector, qformer, t5, vision
from jax_instructblip.models.variants import (
    LanguageConfig,
    LlamaConfig,
    OptConfig,
    ProjectorConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)


@dataclasses.dataclass(frozen=True)
class Tower:
    """One tower of an architecture.

    Attributes:
      section: its section of config.json.
      model_type: the value of `model_type` in that section.
      rules: function of the tower's sizes that returns the conversion rules for its tensors.
      config: the dataclass of its sizes in this package.
    """

    section: Section
    model_type: str
    rules: Callable[..., list[Entry]]
    config: type  # dataclass of the sizes


@dataclasses.dataclass(frozen=True)
class Language(Tower):
    """A language model; its `rules` take `tied_head` as second argument, as `Family.rules` does.

    `head` is the source name of its output head, which is missing where the token embedding is it.
    """

    head: str


@dataclasses.dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Attributes:
      kind: `kind` of the variants (models of this package) that it holds.
      architecture: its name in `architectures` of config.json.
      model_type: its name in `model_type` of config.json.
      top: the keys at the top of config.json that fill fields of the bridge.
      vision: the image encoder.
      bridge: the tower between image encoder and language model.
      languages: the possible language models, by `model_type` in text_config; empty where the
        architecture has none.
      link: function of (vision sizes, language model sizes) that returns fields of the bridge.
      constant: function of a variant that returns keys at the top of config.json, which are
        written, and only checked when read.
      reads_instruction: True if the bridge reads the instruction beside the image.
      heads: function that returns the rules for heads on the bridge, where there is no language
        model.
      prefixes: the beginnings of tensor names in the tables, each with those that other versions
        of transformers write instead.
    """

    kind: str
    architecture: str
    model_type: str
    top: Section
    vision: Tower
    bridge: Tower
    languages: Mapping[str, Language]
    link: Callable[[Any, Any], Mapping[str, Any]]
    constant: Callable[[Variant], Mapping[str, Any]]
    reads_instruction: bool
    heads: Callable[[Any], list[Entry]] = lambda bridge: []
    prefixes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def towers(self, variant: Variant) -> list[tuple[Tower, Any]]:
        """Returns (tower, its sizes) for each tower of a variant."""
        towers = [(self.vision, variant.vision), (self.bridge, variant.bridge)]
        if variant.llm is not None:
            towers.append((self.languages[language_type(variant.llm)], variant.llm))
        return towers

    def language(self, variant: Variant) -> Language | None:
        """Returns the row of the variant's language model; None if the variant has none."""
        return None if variant.llm is None else self.languages[language_type(variant.llm)]

    def rules(self, variant: Variant, tied_head: bool = False) -> list[Entry]:
        """Returns the rules for all tensors of a variant.

        With `tied_head`, for a source that has no head of its own, T5's output head is filled from
        its token embedding. Other language models ignore it: their sizes tell.
        """
        entries = [*self.vision.rules(variant.vision), *self.bridge.rules(variant.bridge)]
        if (language := self.language(variant)) is None:
            return [*entries, *self.heads(variant.bridge)]
        return [*entries, *language.rules(variant.llm, tied_head)]

    def prefix(self, name: str) -> tuple[str, str]:
        """Returns the prefix of a tensor's name in the tables, and the prefix in the file.

        `name` is the tensor's name in the file. Both are "" if no row of `prefixes` applies.
        """
        for ours, others in self.prefixes.items():
            for theirs in (ours, *others):
                if name.startswith(theirs):
                    return ours, theirs
        return "", ""

    def sizes(self, variant: Variant) -> list[tuple[str, int, bool]]:
        """Returns (key, value, is_layers) of each size that the tensors' shapes or names show.

        `key` is that of config.json; `is_layers` is True for a number of layers, False for the
        length of an axis.
        """
        parts = [(self.top, variant.bridge)]
        parts += [(tower.section, sizes) for tower, sizes in self.towers(variant)]
        return [size for section, sizes in parts for size in section.sizes(sizes)]

    def config(self, variant: Variant) -> dict[str, Any]:
        """Returns the content of the config.json that describes a variant."""
        document = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.top.write(variant.bridge),
            **self.constant(variant),
        }
        for tower, sizes in self.towers(variant):
            keys = tower.section.write(sizes)
            if tower.section.name:
                document[tower.section.name] = {"model_type": tower.model_type, **keys}
        return document


def language_type(llm: LanguageConfig) -> str:
    """Returns the `model_type` of a language model in transformers, a key of `LANGUAGES`."""
    return llama_sections.model_type(llm) if isinstance(llm, LlamaConfig) else llm.kind


def with_own_head(llm: Any, has_head: bool) -> Any:
    """Returns the sizes `llm`, without `tied_head` if the model's files have a head (`has_head`).

    A head that is there is taken, even if config.json says that the embedding is the head.
    """
    tied = has_head and isinstance(llm, LlamaConfig) and llm.tied_head
    return dataclasses.replace(llm, tied_head=False) if tied else llm


LANGUAGES = {
    "t5": Language(T5, "t5", t5.rules, T5Config, t5.HEAD),
    "opt": Language(OPT, "opt", opt.rules, OptConfig, opt.HEAD),
} | {
    name: Language(section, name, llama.rules, LlamaConfig, llama.HEAD)
    for name, section in llama_sections.SECTIONS.items()
}


# The beginnings of LLaVA's names: of the released folders, then of other versions of transformers.
LLAVA_PREFIXES = {
    "language_model.model.": ("model.language_model.",),
    "language_model.lm_head.": ("lm_head.",),
    "vision_tower.vision_model.": (
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
        "vision_tower.",
    ),
    "multi_modal_projector.": ("model.multi_modal_projector.",),
}
FAMILIES = (
    Family(
        kind="instructblip",
        architecture="InstructBlipForConditionalGeneration",
        model_type="instructblip",
        top=Section("", (Key("num_query_tokens", "queries", AXIS, 32),)),
        vision=Tower(EVA_VIT, "instructblip_vision_model", vision.rules, VisionConfig),
        bridge=Tower(QFORMER, "instructblip_qformer", qformer.rules, QFormerConfig),
        languages=LANGUAGES,
        link=lambda vision, llm: {
            "llm_width": llm.width,
            # Hugging Face normalises the tower's output with the tower's eps; LAVIS has 1e-5.
            "image_norm_eps": vision.norm_eps,
        },
        constant=lambda variant: {
            "use_decoder_only_language_model": not variant.llm.encoder_decoder
        },
        reads_instruction=True,
    ),
    Family(
        kind="blip2",
        architecture="Blip2ForConditionalGeneration",
        model_type="blip-2",
        top=Section("", (Key("num_query_tokens", "queries", AXIS, 32),)),
        vision=Tower(EVA_VIT, "blip_2_vision_model", vision.rules, VisionConfig),
        bridge=Tower(
            BLIP2_QFORMER,
            "blip_2_qformer",
            functools.partial(qformer.rules, norm="qformer.layernorm."),
            QFormerConfig,
        ),
        languages=LANGUAGES,
        link=lambda vision, llm: {
            "llm_width": llm.width,
            "image_norm_eps": vision.norm_eps,
            "instruction_aware": False,
        },
        constant=lambda variant: {
            "use_decoder_only_language_model": not variant.llm.encoder_decoder
        },
        reads_instruction=False,
    ),
    Family(
        kind="blip2_stage1",
        architecture="Blip2ForImageTextRetrieval",
        model_type="blip-2",
        top=Section(
            "",
            (
                Key("num_query_tokens", "queries", AXIS, 32),
                Key("image_text_hidden_size", "feature_width", AXIS, 256),
            ),
        ),
        vision=Tower(EVA_VIT, "blip_2_vision_model", vision.rules, VisionConfig),
        bridge=Tower(
            BLIP2_ITM_QFORMER,
            "blip_2_qformer",
            functools.partial(qformer.rules, norm="qformer.layernorm.", embeddings="embeddings."),
            QFormerConfig,
        ),
        languages={},
        link=lambda vision, llm: {
            "llm_width": 0,
            "image_norm_eps": vision.norm_eps,
            "caption_head": False,  # the format has none
        },
        constant=lambda variant: {},
        reads_instruction=False,
        heads=heads.rules,
    ),
    Family(
        kind="llava",
        architecture="LlavaForConditionalGeneration",
        model_type="llava",
        top=PROJECTOR,
        vision=Tower(CLIP_VIT, "clip_vision_model", vision.clip_rules, VisionConfig),
        bridge=Tower(Section("", ()), "", projector.rules, ProjectorConfig),
        languages={name: LANGUAGES[name] for name in llama_sections.SECTIONS},
        link=lambda vision, llm: {"vision_width": vision.width, "llm_width": llm.width},
        constant=lambda variant: {},
        reads_instruction=False,
        prefixes=LLAVA_PREFIXES,
    ),
)


def family_of(variant: Variant) -> Family:
    """Returns the architecture that holds variants of this kind; a ValueError if none is known."""
    for family in FAMILIES:
        if family.kind == variant.kind:
            return family
    known = ", ".join(family.kind for family in FAMILIES)
    raise ValueError(
        f"no Hugging Face architecture is known for a model of kind {variant.kind!r}; there are "
        f"those of {known}"
    )
