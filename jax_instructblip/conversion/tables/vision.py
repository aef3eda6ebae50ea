"""Conversion tables of the vision tower: tensors of a file, parameters of `vision/`.

`rules` has Hugging Face's names of EVA ViT-g (`vision_model.`), `openai_rules` those of CLIP ViT-L
in OpenAI's file, below `visual_encoder.` as LAVIS has it, `clip_rules` those of CLIP in Hugging
Face's folders of LLaVA, which store all blocks and the norm after them.
"""

from collections.abc import Callable, Mapping

from jax_instructblip.conversion.engine import Drop, Entry, Rule, Zeros
from jax_instructblip.conversion.transforms import (
    Transform,
    attention_bias,
    attention_in,
    attention_out,
    identity,
    linear,
    patches,
    with_axes,
)
from jax_instructblip.models.variants import VisionConfig

NO_KEY_BIAS = (
    "the ViT was trained without a key bias, so this network has none; a folder whose key bias was "
    "trained cannot be held"
)
PARTS = ("query", "key", "value")  # of one tensor, in this order
_BLOCK = {  # of Hugging Face
    "attention/out/kernel": "self_attn.projection.weight",
    "attention/out/bias": "self_attn.projection.bias",
    "attention_norm/scale": "layer_norm1.weight",
    "attention_norm/bias": "layer_norm1.bias",
    "mlp_norm/scale": "layer_norm2.weight",
    "mlp_norm/bias": "layer_norm2.bias",
    "mlp/in/kernel": "mlp.fc1.weight",
    "mlp/in/bias": "mlp.fc1.bias",
    "mlp/out/kernel": "mlp.fc2.weight",
    "mlp/out/bias": "mlp.fc2.bias",
}
_CLIP_BLOCK = {
    **{name: key.replace("projection", "out_proj") for name, key in _BLOCK.items()},
    **{
        f"attention/{name}/{leaf}": f"self_attn.{name[0]}_proj.{kind}"
        for name in PARTS
        for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
    },
}
CLIP_PREFIX = "vision_tower.vision_model."
_OPENAI_BLOCK = {
    "attention/out/kernel": "attn.out_proj.weight",
    "attention/out/bias": "attn.out_proj.bias",
    "attention_norm/scale": "ln_1.weight",
    "attention_norm/bias": "ln_1.bias",
    "mlp_norm/scale": "ln_2.weight",
    "mlp_norm/bias": "ln_2.bias",
    "mlp/in/kernel": "mlp.c_fc.weight",
    "mlp/in/bias": "mlp.c_fc.bias",
    "mlp/out/kernel": "mlp.c_proj.weight",
    "mlp/out/bias": "mlp.c_proj.bias",
}


def rules(config: VisionConfig) -> list[Entry]:
    """Returns the rules for all vision tensors but the last norm; the Q-Former's table has that."""
    source, target = "vision_model.embeddings.", "vision/"
    entries: list[Entry] = [
        Rule(source + "class_embedding", target + "cls", identity),
        Rule(source + "position_embedding", target + "pos_embed", identity),
        Rule(source + "patch_embedding.weight", target + "patch_embed/kernel", patches),
        Rule(source + "patch_embedding.bias", target + "patch_embed/bias", identity),
    ]
    source = "vision_model.encoder.layers.{i}."
    bias = source + "self_attn.qkv.bias"
    entries += _parts(config, source + "self_attn.qkv.weight", "kernel", attention_in)
    entries += _parts(config, bias, "bias", attention_bias, without="key")
    entries.append(Zeros(bias, NO_KEY_BIAS, (1, 3), range(config.layers)))
    return entries + _block(config, source, _BLOCK)


def openai_rules(config: VisionConfig) -> list[Entry]:
    """Returns the rules for CLIP's tower in OpenAI's file, under LAVIS's names of its tensors.

    The last block and what follows it have no rules.
    """
    source, target = "visual_encoder.", "vision/"
    entries: list[Entry] = [
        Rule(source + "class_embedding", target + "cls", with_axes(2)),
        Rule(source + "positional_embedding", target + "pos_embed", with_axes(1)),
        Rule(source + "conv1.weight", target + "patch_embed/kernel", patches),
        Rule(source + "ln_pre.weight", target + "pre_norm/scale", identity),
        Rule(source + "ln_pre.bias", target + "pre_norm/bias", identity),
    ]
    source += "transformer.resblocks.{i}."
    entries += _parts(config, source + "attn.in_proj_weight", "kernel", attention_in)
    entries += _parts(config, source + "attn.in_proj_bias", "bias", attention_bias)
    return entries + _block(config, source, _OPENAI_BLOCK)


def clip_rules(config: VisionConfig) -> list[Entry]:
    """Returns the rules for CLIP's tower in a folder of LLaVA, its unused last blocks included."""
    source, target = CLIP_PREFIX + "embeddings.", "vision/"
    entries: list[Entry] = [
        Rule(source + "class_embedding", target + "cls", with_axes(2)),
        Rule(source + "position_embedding.weight", target + "pos_embed", with_axes(1)),
        Rule(source + "patch_embedding.weight", target + "patch_embed/kernel", patches),
        Drop(source + "position_ids", "the numbers 0, 1, 2 ...: no weight"),
    ]
    # "layrn" is their spelling.
    norms = {"pre_layrnorm": "pre_norm", "post_layernorm": "unused/norm"}
    entries += [
        Rule(f"{CLIP_PREFIX}{theirs}.{kind}", f"{target}{ours}/{leaf}", identity)
        for theirs, ours in norms.items()
        for kind, leaf in (("weight", "scale"), ("bias", "bias"))
    ]
    used, source = config.computed_layers, CLIP_PREFIX + "encoder.layers.{i}."
    entries += _block(config, source, _CLIP_BLOCK, range(used))
    unused = range(used, config.layers)
    return entries + _block(config, source, _CLIP_BLOCK, unused, target + "unused/layers/")


def _parts(
    config: VisionConfig,
    source: str,
    leaf: str,
    transform: Callable[[int], Transform],
    without: str = "",
) -> list[Entry]:
    """Returns the rules for a tensor that holds query, key and value one after another."""
    return [
        Rule(
            source,
            f"vision/layers/attention/{name}/{leaf}",
            transform(config.heads),
            range(config.layers),
            (part, len(PARTS)),
        )
        for part, name in enumerate(PARTS)
        if name != without
    ]


def _block(
    config: VisionConfig,
    source: str,
    names: Mapping[str, str],
    layers: range | None = None,
    target: str = "vision/layers/",
) -> list[Entry]:
    """Returns the rules for the other tensors of a layer; `names` maps our leaf to their tensor.

    `layers` are the numbers of the layers whose leaves lie below `target`, by default all.
    """
    layers = range(config.layers) if layers is None else layers
    transforms = {"attention/out/kernel": attention_out(config.heads)}
    transforms |= {"mlp/in/kernel": linear, "mlp/out/kernel": linear}
    for name in PARTS:
        transforms[f"attention/{name}/kernel"] = attention_in(config.heads)
        transforms[f"attention/{name}/bias"] = attention_bias(config.heads)
    return [
        Rule(
            source + theirs,
            f"{target}{ours}",
            transforms.get(ours, identity),
            layers,
        )
        for ours, theirs in names.items()
    ]
