"""Loads the tokenizers of a model from a checkpoint folder or from bare vocabulary files."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import transformers

from jax_instructblip.data.byte_tokenizers import (
    BYTES,
    UNNAMED,
    splits_bytes,
    unnamed_special,
)
from jax_instructblip.data.sentencepiece_bpe import split_as_sentencepiece
from jax_instructblip.data.special_tokens import RELEASED_SPECIAL
from jax_instructblip.files import require_file

# Concrete classes, because AutoTokenizer imports torch if it is installed, and guesses the class.
_CLASSES = {
    "t5": transformers.T5Tokenizer,
    "llama": transformers.LlamaTokenizer,
    "opt": transformers.GPT2Tokenizer,
}
_SENTENCEPIECE = ("tokenizer.json", "tokenizer.model", "spiece.model")
_FILES = {"t5": _SENTENCEPIECE, "llama": _SENTENCEPIECE, "opt": ("tokenizer.json", "vocab.json")}

# Optional files beside the vocabulary that transformers reads.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

Tokenizer = transformers.PreTrainedTokenizerFast
if TYPE_CHECKING:  # so that callers need not check for None
    MaybeTokenizer = Tokenizer
else:
    MaybeTokenizer = Tokenizer | None


def tokenizer_folders(folder: str | os.PathLike[str]) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the folders of the language model's and of the Q-Former's tokenizer.

    `folder` is a checkpoint folder. Those of this package have the language model's tokenizer in
    `tokenizer/`, those of Hugging Face at their root; both have the Q-Former's in
    `qformer_tokenizer/`.
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
    released: str | None = None,
) -> tuple[Tokenizer, MaybeTokenizer]:
    """Returns the tokenizers of the language model and of the Q-Former.

    Args:
      llm_folder: files that transformers saves (`tokenizer.json`, `tokenizer_config.json`), or only
        a vocabulary (`spiece.model`, `tokenizer.model`, or `vocab.json` with `merges.txt`).
      qformer_folder: likewise, or `vocab.txt`; None for a Q-Former that reads no text, whose
        tokenizer is returned as None.
      kind: the language model, 't5', 'llama' or 'opt'.
      special: special tokens by name (`{'bos_token': '</s>'}`). By default they are those of the
        folder's tokenizer_config.json, or without such a file those of the released model. Those
        that a tokenizer of bytes lacks are `unnamed_special`.
      released: the released model in `RELEASED_SPECIAL`, by default `kind`.

    Raises:
      FileNotFoundError: a tokenizer has no files.
      ValueError: its files are damaged, or `kind` is unknown.
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
        special = released_special(llm_folder, released or kind) if bare else {}
    if kind == "llama" and splits_bytes(llm_folder):
        llm = _read(Tokenizer, llm_folder, "language model's", **special)
        named = {name: getattr(llm, f"{name}_token") for name in UNNAMED}
        for name, token in unnamed_special(named, llm.get_vocab()).items():
            setattr(llm, f"{name}_token", token)
        return _without_limits(llm), cast(Any, qformer)
    llm = _read(_CLASSES[kind], llm_folder, "language model's", **special)
    if kind == "llama":
        split_as_sentencepiece(llm, llm_folder)
    return _without_limits(llm), cast(Any, qformer)


def decodes_bytes(tokenizer: Tokenizer) -> bool:
    """Tells whether the pieces of a tokenizer are bytes (`byte_tokenizers.py`)."""
    return BYTES in repr(tokenizer.backend_tokenizer.decoder)


def released_special(folder: str | os.PathLike[str], kind: str) -> Mapping[str, str]:
    """Returns the special tokens that the released models set on a tokenizer, by name.

    A name is `bos_token` and the like; `kind` is a key of `RELEASED_SPECIAL`. There are none for a
    LLaMA-like model whose tokenizer in `folder` is one of bytes.
    """
    own = kind in ("llama", "llava") and splits_bytes(folder)
    return {} if own else RELEASED_SPECIAL[kind]


def load_qformer_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Returns BERT's tokenizer with `[DEC]` added as the start token of generated captions.

    It has 30,523 ids.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
        ValueError: its files are damaged.
    """
    folder = pathlib.Path(folder)
    _require(folder, ("tokenizer.json", "vocab.txt"), "Q-Former's")
    return _without_limits(
        _read(transformers.BertTokenizer, folder, "Q-Former's", bos_token="[DEC]")
    )


def _without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer with truncation and padding off; a tokenizer.json may turn them on."""
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
    except Exception as error:  # damaged files raise any error of the libraries
        raise ValueError(
            f"the {whose} tokenizer in {folder} cannot be read ({type(error).__name__}: {error}): "
            "copy its files again"
        ) from error


def has_unknown(tokenizer: Any, text: str) -> bool:
    """Tells whether a text has characters that the tokenizer maps to `<unk>`.

    All of them get the same id, so the model can neither tell them apart nor write them. A
    tokenizer that falls back to bytes has none.
    """
    backend = tokenizer.backend_tokenizer
    # Ask the backend's model: LAVIS sets another unknown token on LLaMA's tokenizer, without any
    # effect on the ids.
    token = getattr(backend.model, "unk_token", None) or tokenizer.unk_token
    unknown = backend.token_to_id(str(token)) if token else None
    return unknown in backend.encode(text, add_special_tokens=False).ids
