"""Hugging Face folders of a language model alone, as transformers saves them, of tiny sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from jax_instructblip.backbones.tokenizers import make_llama, make_t5
from tests.helpers.tiny import TEXT, make_opt

MODELS = {
    "llama": (transformers.LlamaConfig, "LlamaForCausalLM"),
    "llama_linear": (transformers.LlamaConfig, "LlamaForCausalLM"),
    "llama3": (transformers.LlamaConfig, "LlamaForCausalLM"),
    "mistral": (transformers.MistralConfig, "MistralForCausalLM"),
    "qwen2": (transformers.Qwen2Config, "Qwen2ForCausalLM"),
    "qwen3": (transformers.Qwen3Config, "Qwen3ForCausalLM"),
    "opt": (transformers.OPTConfig, "OPTForCausalLM"),
    "t5": (transformers.T5Config, "T5ForConditionalGeneration"),
}
_LLAMA: dict[str, Any] = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
)
_GROUPED = _LLAMA | dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
# Of Llama 3: the pairs of a head of 8 turn often, rarely, and hardly within 24 positions.
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=3.0,
    original_max_position_embeddings=24,
)
SIZES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama_linear": _LLAMA
    | dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10_000.0)),
    "llama3": _GROUPED | dict(rope_parameters=_LLAMA3),
    "mistral": _GROUPED | dict(num_key_value_heads=1, sliding_window=100),
    "qwen2": _GROUPED | dict(tie_word_embeddings=True),
    "qwen3": _GROUPED | dict(head_dim=12),
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
    tokenizer = tokenizer_of(kind)
    config, model = MODELS[kind]
    torch.manual_seed(0)
    made = getattr(transformers, model)(
        config(**{"vocab_size": len(tokenizer)} | SIZES[kind] | sizes)
    )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return made


def enliven(model: Any, folder: Path) -> None:
    """Draws weights under which every part of a network counts, and saves them to its folder."""
    torch = pytest.importorskip("torch")
    for name, leaf in model.named_parameters():
        noise = torch.randn_like(leaf)
        if name.endswith("bias") or "norm" in name:
            leaf.data = 0.3 * noise + float("norm" in name)
        else:
            leaf.data = noise * (0.5 if "embed" in name else leaf.shape[-1] ** -0.5)
    model.save_pretrained(folder)


def tokenizer_of(kind: str, text: list[str] = TEXT) -> Any:
    """The tokenizer of a released model of that kind, which knows these texts."""
    if kind in ("t5", "opt"):
        return {"t5": make_t5, "opt": make_opt}[kind](text)
    if kind in SPECIAL:
        return make_bytes(text, **SPECIAL[kind])
    return _as_llama_has_it(make_llama(text))


# The special tokens of released tokenizers of bytes; Llama 3 names no padding, Qwen no start.
SPECIAL: dict[str, dict[str, str]] = {
    "llama3": dict(bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"),
    "qwen2": dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    "qwen3": dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
}


def make_bytes(text: list[str], **special: str) -> transformers.PreTrainedTokenizerFast:
    """A BPE tokenizer of bytes with special tokens behind its pieces, as Llama 3's and Qwen's."""
    pieces = make_opt(text).backend_tokenizer
    model = json.loads(pieces.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    plain = [piece for piece in model["vocab"] if not piece.startswith("<")]
    vocab = {piece: index for index, piece in enumerate(plain)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(sorted(special.values()))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def _as_llama_has_it(tokenizer: Any) -> transformers.LlamaTokenizer:
    """The tokenizer with `<s>`, `</s>` and `<unk>`, before a release has set others on it."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.LlamaTokenizer(vocab=model["vocab"], merges=merges)
