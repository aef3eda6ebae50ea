"""From prompt and answer to token ids, targets and masks; plain numpy, one example.

    T5      tokens          prompt ... </s>                  the encoder reads it
            decoder_tokens  <pad> answer ...                 targets shifted right by one
            targets         answer ... </s>

    LLaMA   tokens          </s> prompt ... answer ... </s>
            targets          .   .      ... answer ... </s>  what is learned; '.' is IGNORE

    both    qformer_tokens  [CLS] prompt ... [SEP]           what the Q-Former reads

Limits are those of the released training: a prompt loses tokens on its left, an answer on its
right. For answering, the language model's prompt is not cut. Nothing is padded here, and images
have no token: `batch.py` lays out rows.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import transformers
from tokenizers import decoders

from jax_instructblip.data.sentencepiece_bpe import split_as_sentencepiece
from jax_instructblip.data.spec import IGNORE
from jax_instructblip.fields import text_problem
from jax_instructblip.files import require_file
from jax_instructblip.models.variants import LlamaConfig, T5Config, Variant

# The concrete classes: AutoTokenizer imports torch where it is installed, and guesses the class.
_CLASSES = {"t5": transformers.T5Tokenizer, "llama": transformers.LlamaTokenizer}

# What the released code sets on a LLaMA tokenizer; for a folder that holds only `tokenizer.model`.
RELEASED_SPECIAL = {
    "t5": {},
    "llama": {
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "[PAD]",
    },
}

# Files beside the vocabulary that transformers reads where they are there.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

# What the counts in an example's `truncated` are about, in order.
TRUNCATED = ("instruction", "prompt", "answer")

# Tokens that other programs put where the image goes; here the image has no token.
_PLACEHOLDERS = ("<image>", "<video>")

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

Tokenizer = transformers.PreTrainedTokenizerFast


def tokenizer_folders(folder: str | os.PathLike[str]) -> tuple[pathlib.Path, pathlib.Path]:
    """The folders of the language model's and the Q-Former's tokenizer in a checkpoint folder.

    Our checkpoints have `tokenizer/`; Hugging Face folders have these files at their root.
    """
    folder = pathlib.Path(folder)
    llm = folder / "tokenizer"
    return (llm if llm.is_dir() else folder), folder / "qformer_tokenizer"


def load_tokenizers(
    llm_folder: str | os.PathLike[str],
    qformer_folder: str | os.PathLike[str],
    kind: str,
    *,
    special: Mapping[str, str] | None = None,
) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizers of the language model (of `kind` 't5' or 'llama') and of the Q-Former.

    A folder holds what transformers saves (`tokenizer.json`, `tokenizer_config.json`) or only a
    vocabulary (`spiece.model`, `tokenizer.model`, `vocab.txt`). `special` overrides special tokens
    (`{'bos_token': '</s>'}`); by default they are as the folder's configuration says, and as
    released where it has none.
    """
    if kind not in _CLASSES:
        raise ValueError(f"no tokenizer for a language model of kind {kind!r}: t5 or llama")
    llm_folder, qformer_folder = pathlib.Path(llm_folder), pathlib.Path(qformer_folder)
    _require(llm_folder, ("tokenizer.json", "tokenizer.model", "spiece.model"), "language model's")
    _require(qformer_folder, ("tokenizer.json", "vocab.txt"), "Q-Former's")
    if special is None:
        bare = not (llm_folder / "tokenizer_config.json").exists()
        special = RELEASED_SPECIAL[kind] if bare else {}
    llm = _read(_CLASSES[kind], llm_folder, "language model's", **special)
    if kind == "llama":
        split_as_sentencepiece(llm, llm_folder)
    # [DEC] starts the captions of the first pre-training stage; it makes the vocabulary 30,523.
    bert = transformers.BertTokenizer
    qformer = _read(bert, qformer_folder, "Q-Former's", bos_token="[DEC]")
    for tokenizer in (llm, qformer):
        # A tokenizer.json may carry a length limit or padding of its own.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return llm, qformer


class Limits(NamedTuple):
    """Most tokens of each text, counted as the attributes of `TextProcessor` are."""

    instruction: int
    prompt: int
    answer: int


@dataclasses.dataclass(frozen=True, eq=False)
class TextProcessor:
    """Turns text into the token ids of one variant, and ids back into text.

    Attributes:
      variant: sizes and special ids; the tokenizers are checked against them.
      llm: the language model's tokenizer.
      qformer: the Q-Former's tokenizer (BERT).
      qformer_limit: most ids of an instruction for the Q-Former, [CLS] and [SEP] included.
      prompt_limit: most ids of a training prompt for the language model, `</s>` included.
      answer_limit: most ids of a training answer. As released, for LLaMA the limit counts a first
        `</s>` that is then dropped, and a longer answer loses its closing `</s>`; T5 keeps it.
    """

    variant: Variant
    llm: Tokenizer
    qformer: Tokenizer
    qformer_limit: int = 128
    prompt_limit: int = 128
    answer_limit: int = 256

    def __post_init__(self):
        wrong = [*self._wrong_ids(), *self._wrong_limits()]
        if wrong:
            raise ValueError("the tokenizers do not belong to this model:\n  " + "\n  ".join(wrong))

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], variant: Variant, **limits: int
    ) -> "TextProcessor":
        """The processor of a checkpoint folder, ours or Hugging Face's."""
        tokenizers = load_tokenizers(*tokenizer_folders(folder), variant.llm.kind)
        return cls(variant, *tokenizers, **limits)

    def example(
        self, prompt: str, answer: str, room: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Token ids and targets for training, as drawn at the top; all int32.

        `truncated` [3] is 1 where instruction, prompt or answer lost tokens to its limit; with
        `room`, another example, the limits are its lengths. An answer without any token is an
        error.
        """
        limits = self._limits(room)
        if isinstance(self.variant.llm, T5Config):
            return self._t5_example(self.variant.llm, prompt, answer, limits)
        return self._llama_example(self.variant.llm, prompt, answer, limits)

    def prompt(self, prompt: str) -> dict[str, np.ndarray]:
        """Token ids for answering: `tokens`, not cut, and `qformer_tokens`; all int32.

        `truncated` [3] is as in `example`; only its first number can be 1.
        """
        llm = self.variant.llm
        ids = self._llm_ids(prompt)
        ids = [*ids, llm.eos_id] if isinstance(llm, T5Config) else [llm.bos_id, *ids]
        instruction, cut = self._instruction(prompt, self.qformer_limit)
        return {
            "tokens": _int32(ids),
            "qformer_tokens": instruction,
            "truncated": _int32([cut, False, False]),
        }

    def candidate(self, answer: str) -> np.ndarray:
        """Ids [T] int32 of an answer to be ranked: T5's ends with eos, LLaMA's does not.

        As released: nothing is cut, and no white space taken away as it is in training.
        """
        llm, ids = self.variant.llm, self._llm_ids(answer)
        return _int32([*ids, llm.eos_id] if isinstance(llm, T5Config) else ids)

    def instruction(self, prompt: str) -> np.ndarray:
        """Ids [L] int32 that the Q-Former reads: [CLS] prompt [SEP], cut on the left."""
        _require_readable(prompt)
        return self._instruction(prompt, self.qformer_limit)[0]

    def has_unknown(self, name: str, text: str) -> bool:
        """Looks for pieces of a text that its tokenizer has no id for; `name` is of `TRUNCATED`.

        All of those get one id, `<unk>`: the model cannot tell them apart, nor learn to write them.
        A tokenizer that falls back to bytes knows everything.
        """
        tokenizer = self.qformer if name == "instruction" else self.llm
        backend = tokenizer.backend_tokenizer
        # That of the backend's model: on a tokenizer of LLaMA the released code sets another one,
        # which it uses for nothing.
        token = getattr(backend.model, "unk_token", None) or tokenizer.unk_token
        unknown = backend.token_to_id(str(token)) if token else None
        return unknown in backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of generated ids, without special tokens and outer white space."""
        ids = [int(i) for i in ids]
        if isinstance(self.variant.llm, T5Config):
            return str(self.llm.decode(ids, skip_special_tokens=True)).strip()
        # As released: finished beams are padded with 0, which must not be read as <unk>.
        ids = [self.variant.llm.eos_id if i == 0 else i for i in ids]
        pieces = self.llm.convert_ids_to_tokens(ids, skip_special_tokens=True)
        # A model may have more embeddings than its tokenizer has ids: those have no piece.
        return _join_pieces([piece for piece in pieces if piece is not None]).strip()

    @property
    def rewrites(self) -> bool:
        """Tells whether `decode` may change the end of a text when more ids follow.

        A folder may ask for it (`clean_up_tokenization_spaces`), or bring a decoder of its own.
        """
        if not isinstance(self.variant.llm, T5Config):  # `_join_pieces` never does
            return False
        plain = isinstance(self.llm.backend_tokenizer.decoder, decoders.Metaspace)
        return not plain or bool(getattr(self.llm, "clean_up_tokenization_spaces", False))

    def _limits(self, room: Mapping[str, np.ndarray] | None) -> Limits:
        if room is None:
            return Limits(self.qformer_limit, self.prompt_limit, self.answer_limit)
        instruction, tokens = len(room["qformer_tokens"]), len(room["tokens"])
        answer = int((room["targets"] != IGNORE).sum())
        if isinstance(self.variant.llm, T5Config):
            return Limits(instruction, tokens, answer)
        return Limits(instruction, tokens - answer, answer + 1)

    def _t5_example(
        self, llm: T5Config, prompt: str, answer: str, limits: Limits
    ) -> dict[str, np.ndarray]:
        prompt_ids, prompt_cut = _keep_right(self._llm_ids(prompt), limits.prompt - 1)
        answer_ids, answer_cut = _keep_left(self._answer_ids(answer), limits.answer - 1)
        instruction, instruction_cut = self._instruction(prompt, limits.instruction)
        targets = [*answer_ids, llm.eos_id]
        return {
            "tokens": _int32([*prompt_ids, llm.eos_id]),
            "decoder_tokens": _int32([llm.decoder_start_id, *targets[:-1]]),
            "targets": _int32(targets),
            "qformer_tokens": instruction,
            "truncated": _int32([instruction_cut, prompt_cut, answer_cut]),
        }

    def _llama_example(
        self, llm: LlamaConfig, prompt: str, answer: str, limits: Limits
    ) -> dict[str, np.ndarray]:
        prompt_ids, prompt_cut = _keep_right(self._llm_ids(prompt), limits.prompt - 1)
        answer_ids = [*self._answer_ids(answer), llm.eos_id]
        answer_ids, answer_cut = _keep_left(answer_ids, limits.answer - 1)
        instruction, instruction_cut = self._instruction(prompt, limits.instruction)
        prompt_ids = [llm.bos_id, *prompt_ids]
        return {
            "tokens": _int32([*prompt_ids, *answer_ids]),
            "targets": _int32([IGNORE] * len(prompt_ids) + answer_ids),
            "qformer_tokens": instruction,
            "truncated": _int32([instruction_cut, prompt_cut, answer_cut]),
        }

    def _instruction(self, prompt: str, limit: int) -> tuple[np.ndarray, bool]:
        ids = self.qformer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
        ids, cut = _keep_right(ids, limit - 2)
        return _int32([self.qformer.cls_token_id, *ids, self.qformer.sep_token_id]), cut

    def _answer_ids(self, answer: str) -> list[int]:
        # Right-stripped, because the released code appends "</s>" to the text of a LLaMA answer
        # and its tokenizer takes away the white space in front of it; T5 drops white space anyway.
        ids = self._llm_ids(answer.rstrip())
        if not ids:
            raise ValueError(f"the answer {answer!r} has no token: there is nothing to learn from")
        return ids

    def _llm_ids(self, text: str) -> list[int]:
        _require_readable(text)
        for placeholder in _PLACEHOLDERS:
            if placeholder in text:
                raise ValueError(
                    f"the text {text[:80]!r} contains {placeholder}: images are given beside the "
                    "text and have no token in it; remove it"
                )
        return self.llm.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def _wrong_ids(self) -> list[str]:
        llm = self.variant.llm
        expected = {"eos": llm.eos_id, "pad": llm.pad_id}
        if isinstance(llm, LlamaConfig):
            expected["bos"] = llm.bos_id
        wrong = []
        for name, wanted in sorted(expected.items()):
            actual = getattr(self.llm, f"{name}_token_id")
            if actual != wanted:
                token = getattr(self.llm, f"{name}_token")
                wrong.append(
                    f"{name}: the model expects id {wanted}, the tokenizer has {actual} ({token!r})"
                )
        for name, wanted in (("cls", "[CLS]"), ("sep", "[SEP]")):
            if (token := getattr(self.qformer, f"{name}_token")) != wanted:
                wrong.append(f"{name}: the Q-Former expects {wanted}, its tokenizer has {token!r}")
        for name, tokenizer, vocab in (
            ("language model", self.llm, llm.vocab),
            ("Q-Former", self.qformer, self.variant.qformer.vocab),
        ):
            ids = {i for token, i in tokenizer.get_vocab().items() if token not in _PLACEHOLDERS}
            if max(ids) >= vocab:
                wrong.append(
                    f"vocabulary: the {name} has {vocab} embeddings, its tokenizer ids up to "
                    f"{max(ids)}"
                )
        return wrong

    def _wrong_limits(self) -> list[str]:
        wrong = []
        positions = self.variant.qformer.max_positions
        for name, least, most in (
            ("qformer_limit", 3, positions),
            ("prompt_limit", 1, None),
            ("answer_limit", 2, None),
        ):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                bound = f"at least {least}" + (f" and at most {most}" if most else "")
                wrong.append(f"{name} is {value}, expected {bound}")
        return wrong


def _join_pieces(pieces: Sequence[str]) -> str:
    """The text of SentencePiece pieces; the byte pieces `<0x0A>` in a row are read as UTF-8.

    Each byte that is no UTF-8 becomes U+FFFD, as SentencePiece does; the decoder of transformers
    gives up a whole row of byte pieces for one bad byte.
    """
    data = bytearray()
    for piece in pieces:
        byte = _BYTE_PIECE.fullmatch(piece)
        data += bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
    text = ""
    while data:
        try:
            return text + data.decode()
        except UnicodeDecodeError as error:
            text += data[: error.start].decode() + "\ufffd"
            del data[: error.start + 1]
    return text


def _require_readable(text: str) -> None:
    if problem := text_problem(text):
        raise ValueError(f"the text {text[:80]!r} {problem}")


def _require(folder: pathlib.Path, names: Sequence[str], whose: str) -> None:
    if not any((folder / name).is_file() for name in names):
        present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no folder"
        raise FileNotFoundError(
            f"the {whose} tokenizer is missing: expected one of {', '.join(names)} in {folder}, "
            f"found {present}"
        )
    for name in (*names, *_SETTINGS):
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


def _keep_left(ids: list[int], limit: int) -> tuple[list[int], bool]:
    return ids[:limit], len(ids) > limit


def _keep_right(ids: list[int], limit: int) -> tuple[list[int], bool]:
    return ids[max(len(ids) - limit, 0) :], len(ids) > limit


def _int32(values: Sequence[Any]) -> np.ndarray:
    return np.array(values, np.int32)
