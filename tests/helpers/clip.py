"""A small CLIP image tower in transformers, random weights, and its tensors by OpenAI's names."""

import dataclasses

import torch
import transformers

from jax_instructblip.models.released import CLIP_VIT_L

# The width of the golden first stage, so that its Q-Former fits behind it.
SIZES = dataclasses.replace(CLIP_VIT_L, image_size=56, width=48, layers=3, heads=4, mlp=80)

_NAMES = {  # OpenAI's by those of transformers
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm": ".ln_",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def theirs() -> transformers.CLIPVisionModel:
    """A tower of transformers with one block more than `SIZES`; no bias is 0 and no scale 1."""
    config = transformers.CLIPVisionConfig(
        hidden_size=SIZES.width,
        intermediate_size=SIZES.mlp,
        num_hidden_layers=SIZES.layers + 1,
        num_attention_heads=SIZES.heads,
        image_size=SIZES.image_size,
        patch_size=SIZES.patch_size,
    )
    model = transformers.CLIPVisionModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias") or "norm" in name:
            noise = 0.1 * noise + ("norm" in name and name.endswith("weight"))
        elif "embedding" in name:
            noise = 0.5 * noise
        else:
            noise = 0.9 * noise * parameter[0].numel() ** -0.5
        parameter.data = noise
    return model


def openai_tensors(model: transformers.CLIPVisionModel) -> dict[str, torch.Tensor]:
    """The tensors as OpenAI's file has them: query, key and value of a block are one."""
    state, named = dict(model.state_dict()), {}
    for layer in range(model.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            own = f"encoder.layers.{layer}.self_attn."
            parts = [state.pop(f"{own}{part}_proj.{kind}") for part in "qkv"]
            named[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    for name, tensor in state.items():
        for known, original in _NAMES.items():
            name = name.replace(known, original)
        named[name] = tensor.clone()
    return named | {"proj": torch.ones(SIZES.width, 8)}
