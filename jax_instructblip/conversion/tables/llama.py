"""Conversion table of LLaMA and its relatives: tensors of `language_model.`, leaves of `llm/`.

Qwen 2 has biases of queries, keys and values, Qwen 3 norms of queries and keys.
"""

from jax_instructblip.conversion.engine import Drop, Entry, Rule
from jax_instructblip.conversion.transforms import (
    attention_bias,
    attention_in,
    attention_out,
    identity,
    linear,
)
from jax_instructblip.models.variants import LlamaConfig

PREFIX = "language_model."
EMBED, HEAD = PREFIX + "model.embed_tokens.weight", PREFIX + "lm_head.weight"


def rules(config: LlamaConfig, tied_head: bool = False) -> list[Entry]:
    """Returns the rules for all LLaMA tensors.

    `config.tied_head` says that the token embedding is the head; `tied_head` has no effect.
    """
    del tied_head
    entries: list[Entry] = [
        Rule(EMBED, "llm/embed/embedding", identity),
        Rule(PREFIX + "model.norm.weight", "llm/norm/scale", identity),
    ]
    if not config.tied_head:
        entries.append(Rule(HEAD, "llm/head/kernel", linear))
    heads, key_heads = config.heads, config.cached_heads
    projections = (("q", "query", heads), ("k", "key", key_heads), ("v", "value", key_heads))
    more = []
    if config.key_bias:
        more += [
            (f"self_attn.{short}_proj.bias", f"attention/{name}/bias", attention_bias(count))
            for short, name, count in projections
        ]
    if config.key_norm:
        more += [
            (f"self_attn.{short}_norm.weight", f"{name}_norm/scale", identity)
            for short, name, _ in projections[:2]
        ]
    for theirs, ours, how in (
        ("input_layernorm.weight", "attention_norm/scale", identity),
        *(
            (f"self_attn.{short}_proj.weight", f"attention/{name}/kernel", attention_in(count))
            for short, name, count in projections
        ),
        ("self_attn.o_proj.weight", "attention/out/kernel", attention_out(heads)),
        ("post_attention_layernorm.weight", "mlp_norm/scale", identity),
        ("mlp.gate_proj.weight", "mlp/gate/kernel", linear),
        ("mlp.up_proj.weight", "mlp/in/kernel", linear),
        ("mlp.down_proj.weight", "mlp/out/kernel", linear),
        *more,
    ):
        entries.append(
            Rule(
                f"{PREFIX}model.layers.{{i}}.{theirs}",
                f"llm/layers/{ours}",
                how,
                range(config.layers),
            )
        )
    entries.append(
        Drop(
            PREFIX + "model.layers.{i}.self_attn.rotary_emb.inv_freq",
            "a buffer that follows from the rotary base: no weight",
        )
    )
    return entries
