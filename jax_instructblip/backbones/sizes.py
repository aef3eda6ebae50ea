"""Sizes of the embedded models, except for the vocabularies, which come from the tokenizers."""

from typing import Any

from jax_instructblip.models.variants import VisionConfig

VISION = VisionConfig(image_size=56, width=96, layers=4, heads=4, mlp=384)
QFORMER: dict[str, Any] = dict(
    width=96, layers=4, heads=4, mlp=384, queries=4, max_positions=128, dropout=0.0
)
LANGUAGE: dict[str, dict[str, Any]] = {
    "llama": dict(width=96, heads=4, mlp=256, layers=3, max_positions=256),
    "t5": dict(
        width=96,
        head_width=24,
        heads=4,
        mlp=192,
        encoder_layers=3,
        decoder_layers=2,
        dropout=0.0,
    ),
}
