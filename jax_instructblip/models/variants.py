"""Every model size, as data: what was released, and tiny ones of the same shape.

A `Variant` holds three frozen dataclasses, one a tower. Conversion reads their fields from a
checkpoint's own configuration and tensors; nothing is guessed from a name.
"""

import dataclasses
import difflib
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """EVA ViT-g/14 without its last block; the defaults are the released size."""

    image_size: int = 224  # pixels a side
    patch_size: int = 14  # pixels a side
    width: int = 1408
    layers: int = 39
    heads: int = 16
    mlp: int = 6144
    norm_eps: float = 1e-6

    @property
    def tokens(self) -> int:
        """Tokens of one image: its patches and CLS."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """BERT-base with queries, cross-attention on even layers and two feed-forwards a layer."""

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
    instruction_aware: bool = True  # False: BLIP-2, queries alone and no text branch


@dataclasses.dataclass(frozen=True)
class T5Config:
    """FlanT5 (T5 v1.1): gated feed-forward, relative position bias, untied head."""

    width: int
    head_width: int
    heads: int
    mlp: int
    encoder_layers: int
    decoder_layers: int
    vocab: int = 32128
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm_eps: float = 1e-6
    # 'gelu' is erf, as the released folders say; stock Flan-T5 has 'gelu_new' (tanh).
    activation: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    scale_decoder_outputs: bool = False  # by width^-0.5, where head and embedding are tied
    # Active in training although T5 is frozen: the released code leaves it in train mode.
    dropout: float = 0.1
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0
    kind: Literal["t5"] = "t5"


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Vicuna v1.1 (LLaMA-1): RMSNorm, rotary positions, SwiGLU, untied head."""

    width: int
    heads: int
    mlp: int
    layers: int
    vocab: int = 32001
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    max_positions: int = 2048
    dropout: float = 0.0
    bos_id: int = 2  # the released InstructBLIP sets bos = eos = unk = </s>
    eos_id: int = 2
    pad_id: int = 32000
    kind: Literal["llama"] = "llama"

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


LanguageConfig = T5Config | LlamaConfig


@dataclasses.dataclass(frozen=True)
class Variant:
    """One whole model: its three towers."""

    vision: VisionConfig
    qformer: QFormerConfig
    llm: LanguageConfig

    def __post_init__(self):
        wrong = []
        vision, qformer, llm = self.vision, self.qformer, self.llm
        if qformer.vision_width != vision.width:
            wrong.append(
                f"qformer.vision_width {qformer.vision_width} != vision.width {vision.width}"
            )
        if qformer.llm_width != llm.width:
            wrong.append(f"qformer.llm_width {qformer.llm_width} != llm.width {llm.width}")
        if qformer.layers % 2:
            wrong.append(f"qformer.layers {qformer.layers} is odd: layers come in pairs")
        if vision.image_size % vision.patch_size:
            wrong.append(
                f"vision.image_size {vision.image_size} is no multiple of "
                f"patch_size {vision.patch_size}"
            )
        split = {"vision": vision, "qformer": qformer} | ({"llm": llm} if llm.kind != "t5" else {})
        for name, tower in split.items():  # T5 states its head width
            if tower.width % tower.heads:
                wrong.append(f"{name}.width {tower.width} is not divisible by {tower.heads} heads")
        if wrong:
            raise ValueError("the towers of this variant do not fit together: " + "; ".join(wrong))

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, for `config.json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Variant":
        """The variant that `to_dict` wrote; unknown and missing fields are named in the error."""
        llm = fields["llm"]
        kinds = {"t5": T5Config, "llama": LlamaConfig}
        if llm.get("kind") not in kinds:
            raise ValueError(
                f"llm.kind is {llm.get('kind')!r}, expected one of {', '.join(sorted(kinds))}"
            )
        return cls(
            vision=_build(VisionConfig, "vision", fields["vision"]),
            qformer=_build(QFormerConfig, "qformer", fields["qformer"]),
            llm=_build(kinds[llm["kind"]], "llm", llm),
        )

    def replace(self, **fields: Any) -> "Variant":
        """A copy with dotted fields changed: `replace(**{'qformer.dropout': 0.0})`."""
        towers: dict[str, dict[str, Any]] = {}
        for path, value in fields.items():
            tower, _, field = path.partition(".")
            known = [f.name for f in dataclasses.fields(getattr(self, tower, VisionConfig))]
            if not hasattr(self, tower) or field not in known:
                near = difflib.get_close_matches(field, known, n=1)
                hint = f"; did you mean {tower}.{near[0]}?" if near else ""
                raise ValueError(f"unknown model field {path!r}{hint}")
            towers.setdefault(tower, {})[field] = value
        return dataclasses.replace(
            self,
            **{
                tower: dataclasses.replace(getattr(self, tower), **new)
                for tower, new in towers.items()
            },
        )


def _build(cls: type, name: str, fields: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    unknown, missing = sorted(set(fields) - known), sorted(required - set(fields))
    if unknown or missing:
        raise ValueError(f"{name}: unknown fields {unknown}, missing fields {missing}")
    return cls(**fields)


_VIT_G = VisionConfig()


def _instructblip(llm: LanguageConfig, vision: VisionConfig = _VIT_G, **fields: Any) -> Variant:
    qformer = QFormerConfig(vision_width=vision.width, llm_width=llm.width, **fields)
    return Variant(vision, qformer, llm)


_FLAN_T5_XL = T5Config(
    width=2048, head_width=64, heads=32, mlp=5120, encoder_layers=24, decoder_layers=24
)
_FLAN_T5_XXL = dataclasses.replace(_FLAN_T5_XL, width=4096, heads=64, mlp=10240)
_VICUNA_7B = LlamaConfig(width=4096, heads=32, mlp=11008, layers=32)
_VICUNA_13B = LlamaConfig(width=5120, heads=40, mlp=13824, layers=40)

_TINY_VISION = VisionConfig(image_size=56, width=88, layers=4, heads=4, mlp=384)
_TINY_QFORMER: dict[str, Any] = dict(width=48, layers=4, heads=4, mlp=192, queries=8)

VARIANTS: dict[str, Variant] = {
    "instructblip-flan-t5-xl": _instructblip(_FLAN_T5_XL),
    "instructblip-flan-t5-xxl": _instructblip(_FLAN_T5_XXL),
    "instructblip-vicuna-7b": _instructblip(_VICUNA_7B),
    "instructblip-vicuna-13b": _instructblip(_VICUNA_13B),
    "tiny-t5": _instructblip(
        T5Config(width=64, head_width=16, heads=4, mlp=160, encoder_layers=3, decoder_layers=2),
        _TINY_VISION,
        **_TINY_QFORMER,
    ),
    "tiny-vicuna": _instructblip(
        LlamaConfig(width=64, heads=4, mlp=176, layers=3), _TINY_VISION, **_TINY_QFORMER
    ),
}


def get_variant(name: str) -> Variant:
    """The variant of that name; an unknown one is an error that suggests the nearest."""
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown variant {name!r}; {hint}known: {', '.join(sorted(VARIANTS))}")
    return VARIANTS[name]
