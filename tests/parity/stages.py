"""All that one batch gives, stage by stage, from one compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_instructblip.models.instructblip import InstructBlip
from jax_instructblip.models.layers import LayerNorm
from jax_instructblip.models.masks import padding_mask
from jax_instructblip.models.qformer import QFormer
from jax_instructblip.models.variants import QFormerConfig, Variant
from jax_instructblip.training.loss import cross_entropy


@functools.cache
def stages(variant: Variant):
    """Jitted (qformer, params, batch) -> ((loss, values of each stage), gradient of qformer)."""
    model = InstructBlip(variant)

    def values(qformer, params, batch):
        params = {"params": {**params, "qformer": qformer}}
        logits = model.apply(params, batch)
        total, count = cross_entropy(logits, batch["targets"])
        features = model.apply(params, batch["images"], method="encode_image")
        norm = LayerNorm(variant.qformer.image_norm_eps)
        text = batch.get("qformer_tokens"), batch.get("qformer_mask")
        made = {
            "features": features,
            "image_norm": norm.apply({"params": qformer["image_norm"]}, features),
            "queries": query_outputs(variant.qformer, qformer, features, *text),
            "prompt": model.apply(params, batch, method="prompt")[0],
            "logits": logits,
        }
        if variant.llm.kind == "t5":
            made["encoded"] = model.apply(params, batch, method=_encode)
        return total / count, made

    return jax.jit(jax.value_and_grad(values, has_aux=True))


def query_outputs(config: QFormerConfig, params, features, *text) -> jax.Array:
    """What the projection reads: seen through one that changes nothing."""
    same = {"kernel": jnp.eye(config.width), "bias": jnp.zeros(config.width)}
    module = QFormer(dataclasses.replace(config, llm_width=config.width), jnp.float32)
    return module.apply({"params": {**params, "projection": same}}, features, *text)


def _encode(model, batch):
    inputs, real = model.prompt(batch)
    return model.llm.encoder(inputs, padding_mask(real))
