"""The tokenizers of a model, from a checkpoint folder or from bare vocabulary files."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import transformers

from jax_instructblip.data.sentencepiece_bpe import split_as_sentencepiece
from jax_instructblip.files import require_file

# The concrete classes: AutoTokenizer imports torch where it is installed, and guesses the class.
_CLASSES = {
    "t5": transformers.T5Tokenizer,
    "llama": transformers.LlamaTokenizer,
    "opt": transformers.GPT2Tokenizer,
}
_SENTENCEPIECE = ("tokenizer.json", "tokenizer.model", "spiece.model")
_FILES = {"t5": _SENTENCEPIECE, "llama": _SENTENCEPIECE, "opt": ("tokenizer.json", "vocab.json")}

# What the released code sets on a tokenizer; for a folder that holds only its vocabulary.
RELEASED_SPECIAL = {
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
}

# Files beside the vocabulary that transformers reads where they are there.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

Tokenizer = transformers.PreTrainedTokenizerFast
if TYPE_CHECKING:  # a Q-Former that reads instructions has one, and does not ask
    MaybeTokenizer = Tokenizer
else:
    MaybeTokenizer = Tokenizer | None


def tokenizer_folders(folder: str | os.PathLike[str]) -> tuple[pathlib.Path, pathlib.Path]:
    """The folders of the language model's and the Q-Former's tokenizer in a checkpoint folder.

    Our checkpoints have `tokenizer/`; Hugging Face folders have these files at their root.
    """
    folder = pathlib.Path(folder)
    llm = folder / "tokenizer"
    return (llm if llm.is_dir() else folder), folder / "qformer_tokenizer"


def load_tokenizers(
    llm_folder: str | os.PathLike[str],
    qformer_folder: str | os.PathLike[str] | None,
    kind: str,
    *,
    special: Mapping[str, str] | None = None,
) -> tuple[Tokenizer, MaybeTokenizer]:
    """The tokenizers of the language model (of `kind` 't5', 'llama' or 'opt') and of the Q-Former.

    A folder holds what transformers saves (`tokenizer.json`, `tokenizer_config.json`) or only a
    vocabulary (`spiece.model`, `tokenizer.model`, `vocab.json` with `merges.txt`, `vocab.txt`).
    `special` overrides special tokens (`{'bos_token': '</s>'}`); by default they are as the
    folder's configuration says, and as released where it has none. Without a `qformer_folder`
    there is no tokenizer of the Q-Former: one that does not read instructions needs none.
    """
    if kind not in _CLASSES:
        raise ValueError(
            f"no tokenizer for a language model of kind {kind!r}, expected one of "
            f"{', '.join(_CLASSES)}"
        )
    llm_folder = pathlib.Path(llm_folder)
    _require(llm_folder, _FILES[kind], "language model's")
    qformer = None if qformer_folder is None else load_qformer_tokenizer(qformer_folder)
    if special is None:
        bare = not (llm_folder / "tokenizer_config.json").exists()
        special = RELEASED_SPECIAL[kind] if bare else {}
    llm = _read(_CLASSES[kind], llm_folder, "language model's", **special)
    if kind == "llama":
        split_as_sentencepiece(llm, llm_folder)
    return _without_limits(llm), cast(Any, qformer)


def load_qformer_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """BERT's tokenizer, with `[DEC]` as the beginning of a caption that is written (30,523 ids).

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its files are damaged.
    """
    folder = pathlib.Path(folder)
    _require(folder, ("tokenizer.json", "vocab.txt"), "Q-Former's")
    return _without_limits(
        _read(transformers.BertTokenizer, folder, "Q-Former's", bos_token="[DEC]")
    )


def _without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without a length limit or padding, which its tokenizer.json may carry."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _require(folder: pathlib.Path, names: Sequence[str], whose: str) -> None:
    if not any((folder / name).is_file() for name in names):
        present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no folder"
        raise FileNotFoundError(
            f"the {whose} tokenizer is missing: expected one of {', '.join(names)} in {folder}, "
            f"found {present}"
        )
    for name in (*names, *SETTINGS):
        if (folder / name).exists():  # a pipe would be waited for
            require_file(folder / name)


def _read(kind: type[Tokenizer], folder: pathlib.Path, whose: str, **special: Any) -> Tokenizer:
    try:
        return kind.from_pretrained(folder, **special)
    except Exception as error:  # of damaged files: whatever the libraries below raise
        raise ValueError(
            f"the {whose} tokenizer in {folder} cannot be read ({type(error).__name__}: {error}): "
            "copy its files again"
        ) from error
