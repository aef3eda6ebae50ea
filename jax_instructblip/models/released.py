"""The sizes of the released models, and of tiny models with the same structure, by name."""

import dataclasses
import difflib
from typing import Any

from jax_instructblip.models.variants import (
    LanguageConfig,
    LlamaConfig,
    OptConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)

_VIT_G = VisionConfig()
CLIP_VIT_L = VisionConfig(
    width=1024,
    layers=23,
    heads=16,
    mlp=4096,
    norm_eps=1e-5,
    activation="quick_gelu",
    pre_norm=True,
    key_bias=True,
    patch_bias=False,
    align_corners=True,
)


def _instructblip(llm: LanguageConfig, vision: VisionConfig = _VIT_G, **fields: Any) -> Variant:
    qformer = QFormerConfig(vision_width=vision.width, llm_width=llm.width, **fields)
    return Variant("instructblip", vision, qformer, llm)


_FLAN_T5_XL = T5Config(
    width=2048, head_width=64, heads=32, mlp=5120, encoder_layers=24, decoder_layers=24
)
_FLAN_T5_XXL = dataclasses.replace(_FLAN_T5_XL, width=4096, heads=64, mlp=10240)
_VICUNA_7B = LlamaConfig(width=4096, heads=32, mlp=11008, layers=32)
_VICUNA_13B = LlamaConfig(width=5120, heads=40, mlp=13824, layers=40)
_OPT_2_7B = OptConfig(width=2560, heads=32, mlp=10240, layers=32)
_OPT_6_7B = OptConfig(width=4096, heads=32, mlp=16384, layers=32)


def _blip2(llm: LanguageConfig, vision: VisionConfig = _VIT_G, **fields: Any) -> Variant:
    """The variant of BLIP-2's second stage: its Q-Former reads no instruction."""
    instructed = _instructblip(llm, vision, **fields)
    qformer = dataclasses.replace(instructed.qformer, instruction_aware=False)
    return Variant("blip2", vision, qformer, llm)


def _blip2_stage1(vision: VisionConfig = _VIT_G, features: int = 256, **fields: Any) -> Variant:
    fields = dict(vision_width=vision.width, llm_width=0, feature_width=features) | fields
    none: Any = None
    return Variant("blip2_stage1", vision, QFormerConfig(**fields), none)


# What was fine-tuned on COCO sees larger images.
_VIT_G_COCO = VisionConfig(image_size=364)
_TINY_VISION = VisionConfig(image_size=56, width=88, layers=4, heads=4, mlp=384)
_TINY_QFORMER: dict[str, Any] = dict(width=48, layers=4, heads=4, mlp=192, queries=8)

VARIANTS: dict[str, Variant] = {
    "instructblip-flan-t5-xl": _instructblip(_FLAN_T5_XL),
    "instructblip-flan-t5-xxl": _instructblip(_FLAN_T5_XXL),
    "instructblip-vicuna-7b": _instructblip(_VICUNA_7B),
    "instructblip-vicuna-13b": _instructblip(_VICUNA_13B),
    # Not released: BLIP-2's fine-tunings on questions, whose Q-Former reads them.
    "instructblip-opt-2.7b": _instructblip(_OPT_2_7B),
    "instructblip-opt-6.7b": _instructblip(_OPT_6_7B),
    "blip2-stage1": _blip2_stage1(),
    "blip2-stage1-vit-l": _blip2_stage1(CLIP_VIT_L),
    "blip2-flan-t5-xl": _blip2(_FLAN_T5_XL),
    "blip2-flan-t5-xl-vit-l": _blip2(_FLAN_T5_XL, CLIP_VIT_L),
    "blip2-flan-t5-xxl": _blip2(_FLAN_T5_XXL),
    "blip2-vicuna-7b": _blip2(_VICUNA_7B),
    "blip2-vicuna-13b": _blip2(_VICUNA_13B),
    "blip2-opt-2.7b": _blip2(_OPT_2_7B),
    "blip2-opt-6.7b": _blip2(_OPT_6_7B),
    "blip2-stage1-coco": _blip2_stage1(_VIT_G_COCO),
    "blip2-flan-t5-xl-coco": _blip2(_FLAN_T5_XL, _VIT_G_COCO),
    "blip2-opt-2.7b-coco": _blip2(_OPT_2_7B, _VIT_G_COCO),
    "blip2-opt-6.7b-coco": _blip2(_OPT_6_7B, _VIT_G_COCO),
    "tiny-stage1": _blip2_stage1(_TINY_VISION, 24, **_TINY_QFORMER),
    "tiny-t5": _instructblip(
        T5Config(width=64, head_width=16, heads=4, mlp=160, encoder_layers=3, decoder_layers=2),
        _TINY_VISION,
        **_TINY_QFORMER,
    ),
    "tiny-vicuna": _instructblip(
        LlamaConfig(width=64, heads=4, mlp=176, layers=3), _TINY_VISION, **_TINY_QFORMER
    ),
    "tiny-opt": _blip2(
        OptConfig(width=64, heads=4, mlp=176, layers=3), _TINY_VISION, **_TINY_QFORMER
    ),
}


def released_name(variant: Variant) -> str:
    """The name in `VARIANTS` of the model with this kind and these sizes; "" for none.

    Vocabulary sizes are not compared: releases pad them differently (Vicuna's has 32,001 to 32,003
    rows).
    """
    return next((n for n, known in VARIANTS.items() if not size_differences(variant, known)), "")


def size_differences(found: Variant, wanted: Variant) -> list[str]:
    """Differences of kind and sizes, such as `vision.layers: expected 39, found 4`; [] for none.

    Vocabulary sizes, norm eps, token ids, dropout and activations are not compared, because each
    checkpoint states its own.
    """
    ours, theirs = _sizes(found), _sizes(wanted)
    return [
        f"{name}: expected {theirs[name]}, found {ours[name]}"
        for name in theirs  # other language models have other sizes: `llm.kind` says so
        if name in ours and ours[name] != theirs[name]
    ]


def _sizes(variant: Variant) -> dict[str, Any]:
    """The fields that `size_differences` compares, by dotted name: kind, sizes and rotary base."""
    own = {"norm_eps", "image_norm_eps", "dropout", "vocab", "activation", "scale_decoder_outputs"}
    sizes: dict[str, Any] = {"kind": variant.kind, "bridge": variant.bridge.key}
    for name, tower in variant.towers.items():
        for field, value in dataclasses.asdict(tower).items():
            if field not in own and not field.endswith("_id"):
                sizes[f"{name}.{field}"] = value
    return sizes


def get_variant(name: str) -> Variant:
    """The variant of that name; for an unknown name, a ValueError that suggests the nearest one."""
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown variant {name!r}; {hint}known: {', '.join(sorted(VARIANTS))}")
    return VARIANTS[name]
