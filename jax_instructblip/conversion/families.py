"""The architectures of Hugging Face that are read and written: a row each.

A row says which sections of config.json describe which tower, and which table converts the tower's
tensors. Another architecture is another row, with sections and tables of its own or these.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from jax_instructblip.conversion.config_keys import AXIS, Key, Section
from jax_instructblip.conversion.engine import Entry
from jax_instructblip.conversion.sections import (
    BLIP2_ITM_QFORMER,
    BLIP2_QFORMER,
    EVA_VIT,
    LLAMA,
    OPT,
    QFORMER,
    T5,
)
from jax_instructblip.conversion.tables import heads, llama, opt, qformer, t5, vision
from jax_instructblip.models.variants import (
    LlamaConfig,
    OptConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)


@dataclasses.dataclass(frozen=True)
class Tower:
    """A tower of an architecture: its section, what `model_type` is there, its tensors' table."""

    section: Section
    model_type: str
    rules: Callable[..., list[Entry]]
    config: type  # of our sizes


@dataclasses.dataclass(frozen=True)
class Language(Tower):
    """A language model; `head` is the source name of its head, which may be tied."""

    head: str


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
      kind: of the variants that it is.
      architecture: its name in `architectures`.
      model_type: its name in `model_type`.
      top: keys at the top of config.json, which fill fields of the bridge.
      vision: the image encoder.
      bridge: the tower between it and the language model.
      languages: the language models that it may have, by `model_type` of text_config; empty where
        it has none.
      link: fields of the bridge that follow from vision and language model.
      constant: keys at the top that are only written, from the variant.
      reads_instruction: whether the bridge is given the instruction beside the image.
      heads: the table of what reads the bridge's outputs, where there is no language model.
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

    def towers(self, variant: Variant) -> list[tuple[Tower, Any]]:
        """The towers and the sizes of each."""
        towers = [(self.vision, variant.vision), (self.bridge, variant.bridge)]
        if variant.llm is not None:
            towers.append((self.languages[variant.llm.kind], variant.llm))
        return towers

    def language(self, variant: Variant) -> Language | None:
        """The language model's row; None where it has none."""
        return None if variant.llm is None else self.languages[variant.llm.kind]

    def rules(self, variant: Variant, tied_head: bool = False) -> list[Entry]:
        """The tables of all towers; with `tied_head` the embedding fills the head as well."""
        entries = [*self.vision.rules(variant.vision), *self.bridge.rules(variant.bridge)]
        if (language := self.language(variant)) is None:
            return [*entries, *self.heads(variant.bridge)]
        return [*entries, *language.rules(variant.llm, tied_head)]

    def sizes(self, variant: Variant) -> list[tuple[str, int, bool]]:
        """(key, value, whether it counts layers) of each size that tensors show by their shapes."""
        parts = [(self.top, variant.bridge)]
        parts += [(tower.section, sizes) for tower, sizes in self.towers(variant)]
        return [size for section, sizes in parts for size in section.sizes(sizes)]

    def config(self, variant: Variant) -> dict[str, Any]:
        """The config.json that describes a variant."""
        document = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.top.write(variant.bridge),
            **self.constant(variant),
        }
        for tower, sizes in self.towers(variant):
            keys = tower.section.write(sizes)
            document[tower.section.name] = {"model_type": tower.model_type, **keys}
        return document


LANGUAGES = {
    "t5": Language(T5, "t5", t5.rules, T5Config, t5.HEAD),
    "llama": Language(LLAMA, "llama", llama.rules, LlamaConfig, llama.HEAD),
    "opt": Language(OPT, "opt", opt.rules, OptConfig, opt.HEAD),
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
)


def family_of(variant: Variant) -> Family:
    """The architecture that holds such variants; a ValueError where none is known."""
    for family in FAMILIES:
        if family.kind == variant.kind:
            return family
    known = ", ".join(family.kind for family in FAMILIES)
    raise ValueError(
        f"no Hugging Face architecture is known for a model of kind {variant.kind!r}; there are "
        f"those of {known}"
    )
