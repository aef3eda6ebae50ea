"""Conversion table of LLaMA and Vicuna: tensors of `language_model.`, parameters of `llm/`."""

from jax_instructblip.conversion.engine import Drop, Entry, Rule
from jax_instructblip.conversion.transforms import attention_in, attention_out, identity, linear
from jax_instructblip.models.variants import LlamaConfig

PREFIX = "language_model."
EMBED, HEAD = PREFIX + "model.embed_tokens.weight", PREFIX + "lm_head.weight"


def rules(config: LlamaConfig, tied_head: bool = False) -> list[Entry]:
    """Returns the rules for all LLaMA tensors.

    With `tied_head`, for a source without a head of its own, the output head is filled from the
    token embedding.
    """
    entries: list[Entry] = [
        Rule(EMBED, "llm/embed/embedding", identity),
        Rule(EMBED if tied_head else HEAD, "llm/head/kernel", linear),
        Rule(PREFIX + "model.norm.weight", "llm/norm/scale", identity),
    ]
    heads = config.heads
    for theirs, ours, how in (
        ("input_layernorm", "attention_norm/scale", identity),
        ("self_attn.q_proj", "attention/query/kernel", attention_in(heads)),
        ("self_attn.k_proj", "attention/key/kernel", attention_in(heads)),
        ("self_attn.v_proj", "attention/value/kernel", attention_in(heads)),
        ("self_attn.o_proj", "attention/out/kernel", attention_out(heads)),
        ("post_attention_layernorm", "mlp_norm/scale", identity),
        ("mlp.gate_proj", "mlp/gate/kernel", linear),
        ("mlp.up_proj", "mlp/in/kernel", linear),
        ("mlp.down_proj", "mlp/out/kernel", linear),
    ):
        entries.append(
            Rule(
                f"{PREFIX}model.layers.{{i}}.{theirs}.weight",
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
