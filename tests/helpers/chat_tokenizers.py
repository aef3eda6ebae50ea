"""Small byte-level tokenizers with the control tokens of Llama 3, Qwen and Mistral."""

import functools

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = ["What is the colour of this cat? The cat on the table is red, I'm sure.\n\n1, 2, 3\n"] * 2

# Llama 3 and Qwen cut text into words by such a rule: a mark takes the line ends behind it along.
WORDS = r"'s|'m|\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*| \p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+"

CONTROL = {
    "llama3": (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eot_id|>",),
    ),
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "mistral_v3": ("<s>", "</s>", "[INST]", "[/INST]"),
}
START = {"llama3": "<|begin_of_text|>", "qwen": None, "mistral_v3": "<s>"}


@functools.cache
def chat_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of one of `CONTROL`, trained on `TEXT`."""
    backend = Tokenizer(models.BPE())
    if kind == "qwen":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=list(CONTROL[kind]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXT, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=START[kind], eos_token=CONTROL[kind][1]
    )
