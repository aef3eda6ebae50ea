"""Conversion table of OPT: tensors below `language_model.`, our parameters below `llm/`."""

from jax_instructblip.conversion.engine import Drop, Entry, Rule
from jax_instructblip.conversion.transforms import (
    attention_bias,
    attention_in,
    attention_out,
    identity,
    linear,
)
from jax_instructblip.models.variants import OptConfig

PREFIX = "language_model."
DECODER = PREFIX + "model.decoder."
EMBED, HEAD = DECODER + "embed_tokens.weight", PREFIX + "lm_head.weight"


def rules(config: OptConfig, tied_head: bool = False) -> list[Entry]:
    """Returns the rules for all OPT tensors.

    OPT's head is always its token embedding, so `tied_head` has no effect. If a file has the head
    as a tensor of its own, its numbers must be the same.
    """
    del tied_head
    entries: list[Entry] = [
        Rule(EMBED, "llm/embed/embedding", identity),
        Drop(HEAD, "it is the token embedding by another name", EMBED),
        Rule(DECODER + "embed_positions.weight", "llm/position_embed/embedding", identity),
        Rule(DECODER + "final_layer_norm.weight", "llm/norm/scale", identity),
        Rule(DECODER + "final_layer_norm.bias", "llm/norm/bias", identity),
    ]
    heads = config.heads
    for theirs, ours, how, bias in (
        ("self_attn.q_proj", "attention/query", attention_in(heads), attention_bias(heads)),
        ("self_attn.k_proj", "attention/key", attention_in(heads), attention_bias(heads)),
        ("self_attn.v_proj", "attention/value", attention_in(heads), attention_bias(heads)),
        ("self_attn.out_proj", "attention/out", attention_out(heads), identity),
        ("fc1", "mlp/in", linear, identity),
        ("fc2", "mlp/out", linear, identity),
        ("self_attn_layer_norm", "attention_norm", identity, identity),
        ("final_layer_norm", "mlp_norm", identity, identity),
    ):
        weight = "scale" if ours.endswith("norm") else "kernel"
        for name, leaf, transform in (("weight", weight, how), ("bias", "bias", bias)):
            entries.append(
                Rule(
                    f"{DECODER}layers.{{i}}.{theirs}.{name}",
                    f"llm/layers/{ours}/{leaf}",
                    transform,
                    range(config.layers),
                )
            )
    return entries
