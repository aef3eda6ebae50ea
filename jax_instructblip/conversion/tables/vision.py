"""Conversion table of the vision tower: tensors of `vision_model.`, parameters of `vision/`."""

from jax_instructblip.conversion.engine import Entry, Rule, Zeros
from jax_instructblip.conversion.transforms import (
    attention_bias,
    attention_in,
    attention_out,
    identity,
    linear,
    patches,
)
from jax_instructblip.models.variants import VisionConfig

NO_KEY_BIAS = (
    "the ViT was trained without a key bias, so this network has none; a folder whose key bias was "
    "trained cannot be held"
)


def rules(config: VisionConfig) -> list[Entry]:
    """Returns the rules for all vision tensors but the last norm; the Q-Former's table has that."""
    source, target = "vision_model.embeddings.", "vision/"
    entries: list[Entry] = [
        Rule(source + "class_embedding", target + "cls", identity),
        Rule(source + "position_embedding", target + "pos_embed", identity),
        Rule(source + "patch_embedding.weight", target + "patch_embed/kernel", patches),
        Rule(source + "patch_embedding.bias", target + "patch_embed/bias", identity),
    ]
    source, target = "vision_model.encoder.layers.{i}.", "vision/layers/"
    layers, heads = range(config.layers), config.heads
    attention = target + "attention/"
    for part, name in enumerate(("query", "key", "value")):
        entries.append(
            Rule(
                source + "self_attn.qkv.weight",
                f"{attention}{name}/kernel",
                attention_in(heads),
                layers,
                (part, 3),
            )
        )
    bias = source + "self_attn.qkv.bias"
    entries += [
        Rule(bias, attention + "query/bias", attention_bias(heads), layers, (0, 3)),
        Zeros(bias, NO_KEY_BIAS, (1, 3), layers),
        Rule(bias, attention + "value/bias", attention_bias(heads), layers, (2, 3)),
    ]
    for theirs, ours, transform in (
        ("self_attn.projection.weight", "attention/out/kernel", attention_out(heads)),
        ("self_attn.projection.bias", "attention/out/bias", identity),
        ("layer_norm1.weight", "attention_norm/scale", identity),
        ("layer_norm1.bias", "attention_norm/bias", identity),
        ("layer_norm2.weight", "mlp_norm/scale", identity),
        ("layer_norm2.bias", "mlp_norm/bias", identity),
        ("mlp.fc1.weight", "mlp/in/kernel", linear),
        ("mlp.fc1.bias", "mlp/in/bias", identity),
        ("mlp.fc2.weight", "mlp/out/kernel", linear),
        ("mlp.fc2.bias", "mlp/out/bias", identity),
    ):
        entries.append(Rule(source + theirs, target + ours, transform, layers))
    return entries
