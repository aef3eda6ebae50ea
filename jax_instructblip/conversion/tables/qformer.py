"""Conversion table of the Q-Former and what is trained with it: image norm, queries, projection.

Layers come in pairs: the even ones of the source, which attend to the image, are stacked under
`layers/cross`, the odd ones under `layers/plain`.
"""

from jax_instructblip.conversion.engine import Drop, Entry, Rule
from jax_instructblip.conversion.transforms import (
    Transform,
    attention_bias,
    attention_in,
    attention_out,
    identity,
    linear,
)
from jax_instructblip.models.variants import QFormerConfig


def rules(
    config: QFormerConfig,
    norm: str = "qformer.embeddings.layernorm.",
    embeddings: str = "qformer.embeddings.",
) -> list[Entry]:
    """Returns the rules for all tensors that instruction tuning trains.

    `norm` and `embeddings` are the prefixes of the first norm and of the embeddings in the source,
    which differ between InstructBLIP and BLIP-2.
    """
    pairs = [
        ("vision_model.post_layernorm.weight", "image_norm/scale", identity),
        ("vision_model.post_layernorm.bias", "image_norm/bias", identity),
        ("query_tokens", "queries", identity),
        (f"{norm}weight", "embed_norm/scale", identity),
        (f"{norm}bias", "embed_norm/bias", identity),
    ]
    if config.llm_width:
        pairs += [
            ("language_projection.weight", "projection/kernel", linear),
            ("language_projection.bias", "projection/bias", identity),
        ]
    if config.instruction_aware:
        pairs += [
            (f"{embeddings}word_embeddings.weight", "text_embed/embedding", identity),
            (f"{embeddings}position_embeddings.weight", "position_embed/embedding", identity),
        ]
    entries: list[Entry] = [Rule(theirs, "qformer/" + ours, how) for theirs, ours, how in pairs]
    for first, stack in enumerate(("cross", "plain")):
        for theirs, ours, how in _layer(config, cross=stack == "cross"):
            entries.append(
                Rule(
                    "qformer.encoder.layer.{i}." + theirs,
                    f"qformer/layers/{stack}/{ours}",
                    how,
                    range(first, config.layers, 2),
                )
            )
    entries.append(
        Drop(f"{embeddings}position_ids", "a buffer that counts 0, 1, 2, ...: no weight")
    )
    return entries


def _layer(config: QFormerConfig, *, cross: bool) -> list[tuple[str, str, Transform]]:
    pairs = _attention("attention", "attention", config.heads)
    pairs += _feed_forward("_query", "query_mlp")
    if cross:
        pairs += _attention("crossattention", "cross_attention", config.heads)
    if config.instruction_aware:
        pairs += _feed_forward("", "text_mlp")
    return pairs


def _attention(theirs: str, ours: str, heads: int) -> list[tuple[str, str, Transform]]:
    pairs = [
        (f"{theirs}.output.dense.weight", f"{ours}/out/kernel", attention_out(heads)),
        (f"{theirs}.output.dense.bias", f"{ours}/out/bias", identity),
        (f"{theirs}.output.LayerNorm.weight", f"{ours}_norm/scale", identity),
        (f"{theirs}.output.LayerNorm.bias", f"{ours}_norm/bias", identity),
    ]
    for name in ("query", "key", "value"):
        pairs += [
            (f"{theirs}.attention.{name}.weight", f"{ours}/{name}/kernel", attention_in(heads)),
            (f"{theirs}.attention.{name}.bias", f"{ours}/{name}/bias", attention_bias(heads)),
        ]
    return pairs


def _feed_forward(suffix: str, ours: str) -> list[tuple[str, str, Transform]]:
    return [
        (f"intermediate{suffix}.dense.weight", f"{ours}/in/kernel", linear),
        (f"intermediate{suffix}.dense.bias", f"{ours}/in/bias", identity),
        (f"output{suffix}.dense.weight", f"{ours}/out/kernel", linear),
        (f"output{suffix}.dense.bias", f"{ours}/out/bias", identity),
        (f"output{suffix}.LayerNorm.weight", f"{ours}_norm/scale", identity),
        (f"output{suffix}.LayerNorm.bias", f"{ours}_norm/bias", identity),
    ]
