"""The output of every stage of a model for one batch, from a single compiled program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_instructblip.models.layers import LayerNorm
from jax_instructblip.models.masks import padding_mask
from jax_instructblip.models.qformer import QFormer
from jax_instructblip.models.variants import QFormerConfig, Variant
from jax_instructblip.models.vlm import VisionLanguageModel
from jax_instructblip.training.loss import count_targets, cross_entropy


@functools.cache
def stages(variant: Variant):
    """Jitted (qformer, params, batch) -> ((loss, values of each stage), gradient of qformer)."""
    model = VisionLanguageModel(variant)

    def values(qformer, params, batch):
        params = {"params": {**params, "qformer": qformer}}
        logits = model.apply(params, batch)
        total, count = cross_entropy(logits, batch["targets"]), count_targets(batch["targets"])
        features = model.apply(params, batch["images"], method="encode_image")
        norm = LayerNorm(variant.qformer.image_norm_eps)
        text = [batch[name][:, 0] for name in ("qformer_tokens", "qformer_mask") if name in batch]
        made = {
            "features": features,
            "image_norm": norm.apply({"params": qformer["image_norm"]}, features),
            "queries": query_outputs(variant.qformer, qformer, features, *text),
            "prompt": model.apply(params, batch, method="embed_row"),
            "logits": logits,
        }
        if variant.llm.kind == "t5":
            made["encoded"] = model.apply(params, batch, method=_encode)
        return total / count, made

    return jax.jit(jax.value_and_grad(values, has_aux=True))


def query_outputs(config: QFormerConfig, params, features, *text) -> jax.Array:
    """The input of the projection, seen through one that changes nothing."""
    same = {"kernel": jnp.eye(config.width), "bias": jnp.zeros(config.width)}
    module = QFormer(dataclasses.replace(config, llm_width=config.width), jnp.float32)
    return module.apply({"params": {**params, "projection": same}}, features, *text)


def _encode(model, batch):
    return model.llm.encoder(model.embed_row(batch), padding_mask(batch["segments"] > 0))
