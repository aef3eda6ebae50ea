"""The sizes of a model as data; `released.py` lists the known models.

A `Variant` holds three frozen dataclasses: the vision tower, the bridge from its patches to the
language model, and the language model. Conversion reads their fields from a checkpoint's own
configuration and tensors; nothing is guessed from a name.
"""

import dataclasses
import difflib
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from jax_instructblip.models.language_configs import (
    LanguageConfig,
    LlamaConfig,
    OptConfig,
    T5Config,
)

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, RGB in 0..1
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = ("float32", "bfloat16", "float16")  # compute dtypes of a model
QUANTISED = ("int8", "int4")  # forms of weights that are quantised (`models/quantise.py`)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision transformer; the defaults are EVA ViT-g/14 without its last block.

    CLIP ViT-L/14 differs in the fields from `activation` on, too (`released.CLIP_VIT_L`).
    """

    image_size: int = 224  # pixels a side
    patch_size: int = 14  # pixels a side
    width: int = 1408
    layers: int = 39
    heads: int = 16
    mlp: int = 6144
    norm_eps: float = 1e-6
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    pre_norm: bool = False  # before the first block
    key_bias: bool = False
    patch_bias: bool = True
    # Of the position table where it is resized to other images: the corners of both grids meet.
    align_corners: bool = False
    unused_layers: int = 0  # the last blocks, which are stored and not computed (LLaVA)
    post_norm: bool = False  # behind all blocks: stored and not computed (LLaVA)

    @property
    def tokens(self) -> int:
        """The number of tokens of one image: its patches and CLS."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def computed_layers(self) -> int:
        """The number of blocks that features pass through."""
        return self.layers - self.unused_layers


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Sizes of the Q-Former: BERT-base plus queries, and cross-attention in even layers.

    Each layer has two feed-forwards: one for the queries, one for the text.
    """

    vision_width: int
    llm_width: int
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    vocab: int = 30523  # BERT uncased + [DEC]
    max_positions: int = 512
    queries: int = 32
    norm_eps: float = 1e-12
    image_norm_eps: float = 1e-5  # LAVIS 1e-5, the Hugging Face port 1e-6
    dropout: float = 0.1
    instruction_aware: bool = True  # has a text branch; False: BLIP-2's second stage
    feature_width: int = 0  # width of the features by which the first stage compares image and text
    caption_head: bool = True  # first stage only; False: as Hugging Face's, which cannot caption
    key: ClassVar[str] = "qformer"  # the key of its tree in the parameters

    def vectors(self, vision: VisionConfig) -> int:
        """The number of vectors that one image becomes: the number of queries."""
        del vision
        return self.queries


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Sizes of LLaVA's projector: one linear layer (v1), or two with a GELU between them (v1.5)."""

    vision_width: int
    llm_width: int
    layers: int = 2
    key: ClassVar[str] = "projector"

    def vectors(self, vision: VisionConfig) -> int:
        """The number of vectors that one image becomes: its patches, without CLS."""
        return vision.tokens - 1


Bridge = QFormerConfig | ProjectorConfig


KINDS = ("instructblip", "blip2", "blip2_stage1", "llava")
WITHOUT_LLM = ("blip2_stage1",)  # kinds whose `llm` is None
BRIDGE_CONFIGS: dict[str, type] = {each.key: each for each in (QFormerConfig, ProjectorConfig)}
LANGUAGE_CONFIGS: dict[str, type] = {each.kind: each for each in (T5Config, LlamaConfig, OptConfig)}
if TYPE_CHECKING:  # code of generative models, which have one, need not check for None
    MaybeLanguage = LanguageConfig
else:
    MaybeLanguage = LanguageConfig | None


@dataclasses.dataclass(frozen=True)
class Variant:
    """One whole model: its kind, and the sizes of vision encoder, bridge and language model.

    Attributes:
      kind: one of `KINDS`.
      vision: the image encoder.
      bridge: the network that maps an image's patches to vectors of the language model's width.
      llm: the language model; None for the kinds in `WITHOUT_LLM`.
    """

    kind: str
    vision: VisionConfig
    bridge: Bridge
    llm: MaybeLanguage

    def __post_init__(self):
        wrong = self._wrong_kind() or [*self._wrong_widths(), *self._wrong_divisions()]
        if wrong:
            raise ValueError("the towers of this variant do not fit together: " + "; ".join(wrong))

    @property
    def qformer(self) -> QFormerConfig:
        """The bridge, if it is a Q-Former; otherwise a ValueError."""
        if not isinstance(self.bridge, QFormerConfig):
            raise ValueError(f"a model of kind {self.kind} has no Q-Former but a {self.bridge.key}")
        return self.bridge

    @property
    def reads_instruction(self) -> bool:
        """True if the bridge reads the instruction as well as the image."""
        return self.llm is not None and getattr(self.bridge, "instruction_aware", False)

    @property
    def visual_tokens(self) -> int:
        """The number of vectors of the language model's width that one image becomes."""
        return self.bridge.vectors(self.vision)

    @property
    def towers(self) -> dict[str, Any]:
        """Sizes by key of the parameters: vision, qformer or projector, llm if there is one."""
        towers = {"vision": self.vision, self.bridge.key: self.bridge, "llm": self.llm}
        return {name: tower for name, tower in towers.items() if tower is not None}

    def to_dict(self) -> dict[str, Any]:
        """A nested dict of plain values, for `config.json`."""
        towers = {name: dataclasses.asdict(tower) for name, tower in self.towers.items()}
        return {"kind": self.kind, **towers}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Variant":
        """The variant of a dict that `to_dict` made; a ValueError names unknown and missing fields.

        A missing `kind` stands for `instructblip`: older checkpoints lack it.
        """
        if not isinstance(fields, dict) or not isinstance(fields.get("kind", ""), str):
            raise ValueError(f"variant is {fields!r:.60}, expected an object of its towers")
        for name in fields.keys() & {"vision", "llm", *BRIDGE_CONFIGS}:
            if not isinstance(fields[name], dict) and (name, fields[name]) != ("llm", None):
                raise ValueError(f"variant.{name} is {fields[name]!r:.60}, expected an object")
        kind = fields.get("kind", "instructblip")
        bridges = [name for name in BRIDGE_CONFIGS if name in fields]
        expected = {"vision", *bridges} | (set() if kind in WITHOUT_LLM else {"llm"})
        unknown, missing = sorted(fields.keys() - expected - {"kind"}), expected - fields.keys()
        if len(bridges) != 1:
            missing.add(" or ".join(BRIDGE_CONFIGS))
        if unknown or missing:
            raise ValueError(f"variant: unknown fields {unknown}, missing fields {sorted(missing)}")
        llm: Any = fields.get("llm")
        if llm is not None and str(llm.get("kind")) not in LANGUAGE_CONFIGS:
            raise ValueError(
                f"llm.kind is {llm.get('kind')!r}, expected one of "
                f"{', '.join(sorted(LANGUAGE_CONFIGS))}"
            )
        (bridge,) = bridges
        language: Any = llm and _build(LANGUAGE_CONFIGS[llm["kind"]], "llm", llm)
        return cls(
            kind=kind,
            vision=_build(VisionConfig, "vision", fields["vision"]),
            bridge=_build(BRIDGE_CONFIGS[bridge], bridge, fields[bridge]),
            llm=language,
        )

    def replace(self, **fields: Any) -> "Variant":
        """A copy with fields changed by dotted name: `replace(**{'qformer.dropout': 0.0})`."""
        towers = self.towers
        changes: dict[str, dict[str, Any]] = {}
        for path, value in fields.items():
            name, _, field = path.partition(".")
            tower = towers.get(name)
            known = [each.name for each in dataclasses.fields(tower or VisionConfig)]
            if tower is None or field not in known:
                near = difflib.get_close_matches(field, known, n=1)
                hint = f"; did you mean {name}.{near[0]}?" if near else ""
                if tower is None:
                    hint = f": a model of kind {self.kind} has {', '.join(towers)}"
                raise ValueError(f"unknown model field {path!r}{hint}")
            changes.setdefault(name, {})[field] = value
        changed = {
            "bridge" if name == self.bridge.key else name: dataclasses.replace(towers[name], **new)
            for name, new in changes.items()
        }
        return dataclasses.replace(self, **changed)

    def _wrong_kind(self) -> list[str]:
        if self.kind not in KINDS:
            return [f"kind is {self.kind!r}, expected one of {', '.join(KINDS)}"]
        wrong = []
        bridge = ProjectorConfig if self.kind == "llava" else QFormerConfig
        if not isinstance(self.bridge, bridge):
            wrong.append(f"a model of kind {self.kind} has a {bridge.key}, not {self.bridge!r}")
        elif self.kind == "blip2" and self.reads_instruction:
            wrong.append(f"the Q-Former of kind {self.kind} does not read the instruction")
        elif self.kind == "blip2_stage1" and not (
            self.qformer.instruction_aware and self.qformer.feature_width
        ):
            wrong.append(
                "the Q-Former of kind blip2_stage1 reads texts (instruction_aware) and has a "
                "feature_width"
            )
        if (self.llm is None) != (self.kind in WITHOUT_LLM):
            having = "no language model" if self.llm is None else "a language model"
            wrong.append(f"a model of kind {self.kind} cannot have {having}")
        return wrong

    def _wrong_widths(self) -> list[str]:
        bridge, wrong = self.bridge, []
        for field, tower, width in (
            ("vision_width", "vision", self.vision.width),
            ("llm_width", "llm", getattr(self.llm, "width", bridge.llm_width)),
        ):
            if (own_width := getattr(bridge, field)) != width:
                wrong.append(f"{bridge.key}.{field} {own_width} != {tower}.width {width}")
        return wrong

    def _wrong_divisions(self) -> list[str]:
        vision, bridge, wrong = self.vision, self.bridge, []
        if isinstance(bridge, QFormerConfig) and bridge.layers % 2:
            wrong.append(f"qformer.layers {bridge.layers} is odd: layers come in pairs")
        if isinstance(bridge, ProjectorConfig) and bridge.layers not in (1, 2):
            wrong.append(f"projector.layers is {bridge.layers}, expected 1 or 2")
        if not vision.computed_layers > 0:
            wrong.append(
                f"vision.unused_layers {vision.unused_layers} is not below layers {vision.layers}"
            )
        if vision.image_size < 1 or vision.image_size % vision.patch_size:
            wrong.append(
                f"vision.image_size {vision.image_size} is no multiple of "
                f"patch_size {vision.patch_size}"
            )
        for name, tower in self.towers.items():
            if isinstance(tower, T5Config | ProjectorConfig):  # T5 states its head width
                continue
            if not getattr(tower, "head_size", 0) and tower.width % tower.heads:
                wrong.append(f"{name}.width {tower.width} is not divisible by {tower.heads} heads")
        llm = self.llm
        if isinstance(llm, LlamaConfig) and llm.heads % llm.cached_heads:
            wrong.append(
                f"llm.heads {llm.heads} is no multiple of key_value_heads {llm.key_value_heads}"
            )
        if isinstance(llm, LlamaConfig) and llm.head_width % 2:
            wrong.append(f"llm.head_width {llm.head_width} is odd: rotary positions turn pairs")
        return wrong


def _build(cls: type, name: str, fields: Any) -> Any:
    """An instance of dataclass `cls`; a ValueError lists all wrong, unknown or missing fields."""
    if not isinstance(fields, dict):
        raise ValueError(f"{name} is {fields!r}, expected its fields by name")
    known = {f.name: f for f in dataclasses.fields(cls)}
    required = {f.name for f in known.values() if f.default is dataclasses.MISSING}
    unknown, missing = sorted(set(fields) - known.keys()), sorted(required - set(fields))
    if unknown or missing:
        raise ValueError(f"{name}: unknown fields {unknown}, missing fields {missing}")
    wrong = [
        f"{name}.{field} is {value!r}, expected {_expected(known[field].type)}"
        for field, value in fields.items()
        if not _is_of(value, known[field].type)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    return cls(**fields)


def _is_of(value: Any, kind: Any) -> bool:
    """True if a JSON value fits a field's annotated type `kind`; whole numbers are at least 0."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and value >= 0
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return value in get_args(kind)


def _expected(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number of at least 0", float: "a number"}
    return names.get(kind) or " or ".join(map(repr, get_args(kind)))
