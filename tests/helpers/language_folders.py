"""Hugging Face folders of a language model alone, as transformers saves them, of tiny sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from jax_instructblip.backbones.tokenizers import make_llama, make_t5
from tests.helpers.tiny import TEXT, make_opt

MODELS = {
    "llama": (transformers.LlamaConfig, "LlamaForCausalLM"),
    "opt": (transformers.OPTConfig, "OPTForCausalLM"),
    "t5": (transformers.T5Config, "T5ForConditionalGeneration"),
}
SIZES: dict[str, dict[str, Any]] = {
    "llama": dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
    ),
    "opt": dict(
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=128,
        word_embed_proj_dim=24,
    ),
    "t5": dict(
        d_model=24,
        d_kv=5,
        d_ff=40,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    ),
}


def write_language(folder: Path, kind: str, **sizes: Any) -> Any:
    """Writes the folder; returns the torch model. LLaMA's has no padding token, as Vicuna's."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    make = {"llama": make_llama, "t5": make_t5, "opt": make_opt}[kind]
    tokenizer = make(TEXT)
    vocab = len(tokenizer) - (kind == "llama")
    if kind == "llama":
        tokenizer = _as_llama_has_it(tokenizer)
    config, model = MODELS[kind]
    torch.manual_seed(0)
    made = getattr(transformers, model)(config(vocab_size=vocab, **SIZES[kind] | sizes))
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return made


def _as_llama_has_it(tokenizer: Any) -> transformers.LlamaTokenizer:
    """The tokenizer with `<s>`, `</s>` and `<unk>`, before a release has set others on it."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.LlamaTokenizer(vocab=model["vocab"], merges=merges)
