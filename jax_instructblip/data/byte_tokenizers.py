"""Facts of tokenizers whose pieces are bytes (Llama 3, Qwen), read without loading a library.

Other LLaMA-like models have a SentencePiece model.
"""

import json
import os
import pathlib
from collections.abc import Collection, Mapping

from jax_instructblip.files import TOKENIZER_LIMIT, read_json

BYTES = "ByteLevel"  # the part of a tokenizer.json that splits and joins bytes

# The texts of special tokens that a tokenizer of bytes may have without naming them: the first one
# in its vocabulary is taken. Qwen starts no text; `<|endoftext|>` is the bos of its config.json.
UNNAMED = {
    "bos": ("<|begin_of_text|>", "<|endoftext|>", "<s>"),
    "eos": ("<|end_of_text|>", "<|endoftext|>", "</s>"),
    "pad": ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|endoftext|>"),
}


def splits_bytes(folder: str | os.PathLike[str]) -> bool:
    """Tells whether the tokenizer.json of a folder is of a tokenizer of bytes, as Llama 3's.

    False if the file is missing or cannot be read. Llama 1 and 2 and most of Mistral's have a
    SentencePiece model instead.
    """
    path = pathlib.Path(folder) / "tokenizer.json"
    try:
        document = read_json(path, dict, limit=TOKENIZER_LIMIT) if path.exists() else {}
    except (OSError, ValueError):
        return False  # whoever reads the tokenizer complains
    return BYTES in json.dumps([document.get("decoder"), document.get("pre_tokenizer")])


def unnamed_special(named: Mapping[str, str | None], vocab: Collection[str]) -> dict[str, str]:
    """Returns texts for those of `bos`, `eos` and `pad` that a tokenizer of bytes does not name.

    `named` maps each of these names to the text that the tokenizer's files give it, or None. The
    results, by name, are taken from `vocab`; if it has no padding token, `pad` is the text of
    `eos`.
    """
    texts = {
        name: next((text for text in texts if text in vocab), None)
        for name, texts in UNNAMED.items()
        if not named.get(name)
    }
    if "pad" in texts and texts["pad"] is None:
        texts["pad"] = named.get("eos") or texts.get("eos")
    return {name: text for name, text in texts.items() if text is not None}


def letter_bytes() -> dict[str, int]:
    """Returns letter -> byte: GPT-2's spelling of pieces, where each letter stands for a byte.

    Printable characters of Latin-1 stand for themselves, and the letters from U+0100 on for the
    other bytes in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}
