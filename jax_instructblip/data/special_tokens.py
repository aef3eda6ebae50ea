"""The special tokens that releases set on a tokenizer, for folders whose files name none."""

from collections.abc import Mapping

# LAVIS's by language model, and LLaVA's, which are LLaMA's own. A LLaMA-like model whose tokenizer
# splits bytes (Llama 3, Qwen) keeps its own.
RELEASED_SPECIAL: dict[str, Mapping[str, str]] = {
    "t5": {},
    "llama": {
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "[PAD]",
    },
    "opt": {
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
    },
    "llava": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
    },
}
