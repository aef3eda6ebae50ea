"""The vocabularies of Llama 3, Qwen and Mistral, as packages on the index carry them."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import transformers
from tokenizers import normalizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from jax_instructblip.data.tokenizer_files import load_tokenizers

PACKAGES = ("llama_models", "dashscope", "mistral_common", "tiktoken")
# Qwen's rule differs from Llama 3's, the converter's own, in cutting numbers into digits.
QWEN = TikTokenConverter().pattern.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
    *("<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)


def released_tokenizers(folder: Path) -> dict[str, transformers.PreTrainedTokenizerFast]:
    """The tokenizers by name, made in `folder`; skips the test where a package is absent."""
    found = {name: importlib.util.find_spec(name) for name in PACKAGES}
    if absent := [name for name, spec in found.items() if spec is None]:
        pytest.skip(f"needs {', '.join(absent)}: pip install --no-deps {' '.join(PACKAGES)}")
    roots = {name: Path(spec.submodule_search_locations[0]) for name, spec in found.items() if spec}
    mistral = roots["mistral_common"] / "data"
    tekken, pattern = _tekken(mistral / "tekken_240911.json", folder / "tekken.tiktoken")
    control = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    return {
        "llama3": _of_bytes(
            roots["llama_models"] / "llama3" / "tokenizer.model",
            LLAMA3,
            bos_token="<|begin_of_text|>",
            eos_token="<|eot_id|>",
        ),
        "qwen": _of_bytes(
            roots["dashscope"] / "resources" / "qwen.tiktoken",
            ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            pattern=QWEN,
            eos_token="<|im_end|>",
        ),
        "tekken": _of_bytes(tekken, control, pattern=pattern, bos_token="<s>", eos_token="</s>"),
        "mistral": _of_pieces(mistral / "tokenizer.model.v1", folder / "v1"),
        "mistral_v3-released": _of_pieces(
            mistral / "mistral_instruct_tokenizer_240323.model.v3", folder / "v3"
        ),
    }


def _tekken(source: Path, path: Path) -> tuple[Path, str]:
    """Writes Mistral's JSON vocabulary as lines of tiktoken; returns the file and its rule."""
    document = json.loads(source.read_text(encoding="utf-8"))
    sizes = document["config"]
    count = sizes["default_vocab_size"] - sizes["default_num_special_tokens"]
    rows = document["vocab"][:count]
    path.write_text("".join(f"{row['token_bytes']} {row['rank']}\n" for row in rows))
    return path, sizes["pattern"]


def _of_bytes(path, control, pattern=None, **named):
    words = {} if pattern is None else {"pattern": pattern}
    backend = TikTokenConverter(str(path), extra_special_tokens=control, **words).converted()
    if pattern == QWEN:
        backend.normalizer = normalizers.NFC()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def _of_pieces(source: Path, folder: Path):
    folder.mkdir()
    shutil.copyfile(source, folder / "tokenizer.model")
    start = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return load_tokenizers(folder, None, "llama", special=start)[0]
