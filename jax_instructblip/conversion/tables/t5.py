"""Conversion table of T5: tensors below `language_model.`, our parameters below `llm/`."""

from jax_instructblip.conversion.engine import Drop, Entry, Rule
from jax_instructblip.conversion.transforms import (
    Transform,
    attention_in,
    attention_out,
    identity,
    linear,
)
from jax_instructblip.models.variants import T5Config

PREFIX = "language_model."
EMBED, HEAD = PREFIX + "shared.weight", PREFIX + "lm_head.weight"


def rules(config: T5Config, tied_head: bool = False) -> list[Entry]:
    """Returns the rules for all T5 tensors.

    With `tied_head`, for a source without a head of its own, the output head is filled from the
    token embedding.
    """
    entries: list[Entry] = [
        Rule(EMBED, "llm/embed/embedding", identity),
        Rule(EMBED if tied_head else HEAD, "llm/head/kernel", linear),
    ]
    for stack, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        theirs, ours = f"{PREFIX}{stack}.", f"llm/{stack}/"
        bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        entries += [
            Rule(theirs + bias, ours + "relative_bias", identity),
            Rule(theirs + "final_layer_norm.weight", ours + "norm/scale", identity),
        ]
        for name, leaf, how in _block(config.heads, decoder=stack == "decoder"):
            entries.append(
                Rule(f"{theirs}block.{{i}}.{name}", f"{ours}layers/{leaf}", how, range(count))
            )
        entries.append(
            Drop(theirs + "embed_tokens.weight", "it is shared.weight by another name", EMBED)
        )
    entries.append(
        Drop(
            PREFIX + "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
            "cross-attention has no position bias; old folders carry this unused tensor",
        )
    )
    return entries


def _block(heads: int, *, decoder: bool) -> list[tuple[str, str, Transform]]:
    pairs = _attention("layer.0", "SelfAttention", "attention", heads)
    if decoder:
        pairs += _attention("layer.1", "EncDecAttention", "cross_attention", heads)
    last = "layer.2" if decoder else "layer.1"
    pairs.append((f"{last}.layer_norm.weight", "mlp_norm/scale", identity))
    for theirs, ours in (("wi_0", "gate"), ("wi_1", "in"), ("wo", "out")):
        pairs.append((f"{last}.DenseReluDense.{theirs}.weight", f"mlp/{ours}/kernel", linear))
    return pairs


def _attention(layer: str, theirs: str, ours: str, heads: int) -> list[tuple[str, str, Transform]]:
    pairs = [
        (f"{layer}.layer_norm.weight", f"{ours}_norm/scale", identity),
        (f"{layer}.{theirs}.o.weight", f"{ours}/out/kernel", attention_out(heads)),
    ]
    for name in ("query", "key", "value"):
        pairs.append(
            (f"{layer}.{theirs}.{name[0]}.weight", f"{ours}/{name}/kernel", attention_in(heads))
        )
    return pairs
