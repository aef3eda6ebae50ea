r"""From prompt and answer to token ids, targets and masks; plain numpy, one example.

    T5      tokens          prompt ... </s>                  the encoder reads it
            decoder_tokens  <pad> answer ...                 targets shifted right by one
            targets         answer ... </s>

    LLaMA   tokens          </s> prompt ... answer ... </s>
            targets          .   .      ... answer ... </s>  what is learned; '.' is IGNORE

    OPT     tokens          </s> prompt ... answer ... \n
            targets          .   .      ... answer ... \n    "\n" is its end

    all     qformer_tokens  [CLS] prompt ... [SEP]           what the Q-Former reads, where it does

Limits are those of the released training: a prompt loses tokens on its left (BLIP-2's on its
right), an answer on its right. For answering, the language model's prompt is not cut. Nothing is
padded here, and images have no token: `batch.py` lays out rows.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import decoders

from jax_instructblip.data.spec import IGNORE
from jax_instructblip.data.tokenizer_files import (
    MaybeTokenizer,
    Tokenizer,
    load_tokenizers,
    tokenizer_folders,
)
from jax_instructblip.fields import text_problem
from jax_instructblip.models.variants import LlamaConfig, OptConfig, T5Config, Variant

# What the counts in an example's `truncated` are about, in order.
TRUNCATED = ("instruction", "prompt", "answer")

# Tokens that other programs put where the image goes; here the image has no token.
_PLACEHOLDERS = ("<image>", "<video>")

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


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
      qformer: the Q-Former's tokenizer (BERT); None where it does not read the instruction.
      qformer_limit: most ids of an instruction for the Q-Former, [CLS] and [SEP] included.
      prompt_limit: most ids of a training prompt for the language model, `</s>` included.
      answer_limit: most ids of a training answer. As released, for LLaMA the limit counts a first
        `</s>` that is then dropped, and a longer answer loses its end; T5 keeps it. OPT as LLaMA:
        the released code counts the `</s>` before a caption.
    """

    variant: Variant
    llm: Tokenizer
    qformer: MaybeTokenizer
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
        llm, qformer = tokenizer_folders(folder)
        qformer = qformer if variant.reads_instruction else None
        return cls(variant, *load_tokenizers(llm, qformer, variant.llm.kind), **limits)

    def example(
        self,
        prompt: str,
        answer: str,
        room: Mapping[str, np.ndarray] | None = None,
        *,
        learn_start: bool = True,
    ) -> dict[str, np.ndarray]:
        """Token ids and targets for training, as drawn at the top; all int32.

        `truncated` [3] is 1 where instruction, prompt or answer lost tokens to its limit; with
        `room`, another example, the limits are its lengths. An answer without any token is an
        error.

        OPT reads prompt and answer as one text, a space between them. Without a prompt its first
        `</s>` is a target, too, which follows the last visual vector: so the released code
        pre-trains its second stage. Without `learn_start` it never is.
        """
        limits = self._limits(room)
        if isinstance(self.variant.llm, T5Config):
            return self._t5_example(self.variant.llm, prompt, answer, limits)
        return self._decoder_example(self.variant.llm, prompt, answer, limits, learn_start)

    def prompt(self, prompt: str) -> dict[str, np.ndarray]:
        """Token ids for answering: `tokens`, not cut, and `qformer_tokens` if read; all int32.

        `truncated` [3] is as in `example`; only its first number can be 1.
        """
        llm = self.variant.llm
        ids = self._llm_ids(prompt)
        ids = [*ids, llm.eos_id] if isinstance(llm, T5Config) else [llm.bos_id, *ids]
        instruction, cut = self._instruction_part(prompt, self.qformer_limit)
        return {"tokens": _int32(ids), **instruction, "truncated": _int32([cut, False, False])}

    def candidate(self, answer: str) -> np.ndarray:
        """Ids [T] int32 of an answer to be ranked: T5's ends with eos, others do not.

        As released: nothing is cut, and no white space taken away as it is in training. OPT's
        begins with the space behind a prompt.
        """
        llm = self.variant.llm
        ids = self._llm_ids(f" {answer}" if isinstance(llm, OptConfig) and answer else answer)
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
        if isinstance(self.variant.llm, OptConfig):
            # As released: " ." becomes ".", for which transformers 5 has a function but no setting.
            text = self.llm.backend_tokenizer.decode(ids, skip_special_tokens=True)
            return self.llm.clean_up_tokenization(text).strip()
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
            return isinstance(self.variant.llm, OptConfig)
        plain = isinstance(self.llm.backend_tokenizer.decoder, decoders.Metaspace)
        return not plain or bool(getattr(self.llm, "clean_up_tokenization_spaces", False))

    def _limits(self, room: Mapping[str, np.ndarray] | None) -> Limits:
        if room is None:
            return Limits(self.qformer_limit, self.prompt_limit, self.answer_limit)
        instruction, tokens = len(room.get("qformer_tokens", ())), len(room["tokens"])
        answer = int((room["targets"] != IGNORE).sum())
        if isinstance(self.variant.llm, T5Config):
            return Limits(instruction, tokens, answer)
        prompt = max(tokens - answer, 1)  # its `</s>`, also where that is a target
        return Limits(instruction, prompt, tokens - prompt + 1)

    def _t5_example(
        self, llm: T5Config, prompt: str, answer: str, limits: Limits
    ) -> dict[str, np.ndarray]:
        prompt_ids, prompt_cut = self._prompt_ids(prompt, limits.prompt - 1)
        answer_ids, answer_cut = _keep_left(self._answer_ids(answer), limits.answer - 1)
        instruction, instruction_cut = self._instruction_part(prompt, limits.instruction)
        targets = [*answer_ids, llm.eos_id]
        return {
            "tokens": _int32([*prompt_ids, llm.eos_id]),
            "decoder_tokens": _int32([llm.decoder_start_id, *targets[:-1]]),
            "targets": _int32(targets),
            **instruction,
            "truncated": _int32([instruction_cut, prompt_cut, answer_cut]),
        }

    def _decoder_example(
        self,
        llm: LlamaConfig | OptConfig,
        prompt: str,
        answer: str,
        limits: Limits,
        learn_start: bool,
    ) -> dict[str, np.ndarray]:
        instruction, instruction_cut = self._instruction_part(prompt, limits.instruction)
        starts = [IGNORE]
        if isinstance(llm, OptConfig):
            # Of one text the space between two words belongs to the second.
            prompt, answer = prompt.rstrip(" "), answer.strip()
            answer = f" {answer}" if prompt and not prompt[-1].isspace() and answer else answer
        prompt_ids, prompt_cut = self._prompt_ids(prompt, limits.prompt - 1)
        answer_ids = [*self._answer_ids(answer), llm.eos_id]
        answer_ids, answer_cut = _keep_left(answer_ids, limits.answer - 1)
        if isinstance(llm, OptConfig) and learn_start and not prompt_ids:
            starts = [llm.bos_id]
        return {
            "tokens": _int32([llm.bos_id, *prompt_ids, *answer_ids]),
            "targets": _int32([*starts, *[IGNORE] * len(prompt_ids), *answer_ids]),
            **instruction,
            "truncated": _int32([instruction_cut, prompt_cut, answer_cut]),
        }

    def _instruction_part(self, prompt: str, limit: int) -> tuple[dict[str, np.ndarray], bool]:
        """The part of an example that the Q-Former reads, if it does, and whether it was cut."""
        if not self.variant.reads_instruction:
            return {}, False
        ids, cut = self._instruction(prompt, limit)
        return {"qformer_tokens": ids}, cut

    def _instruction(self, prompt: str, limit: int) -> tuple[np.ndarray, bool]:
        ids = self.qformer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
        ids, cut = _keep_right(ids, limit - 2)
        return _int32([self.qformer.cls_token_id, *ids, self.qformer.sep_token_id]), cut

    def _prompt_ids(self, prompt: str, limit: int) -> tuple[list[int], bool]:
        """At most `limit` ids of a training prompt, and whether it was cut."""
        keep = _keep_left if self.variant.kind == "blip2" else _keep_right
        return keep(self._llm_ids(prompt), limit)

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
        expected, wrong = {"pad": llm.pad_id}, []
        if isinstance(llm, LlamaConfig | OptConfig):
            expected["bos"] = llm.bos_id
        if not isinstance(llm, OptConfig):
            expected["eos"] = llm.eos_id
        elif (end := self.llm.backend_tokenizer.encode("\n", add_special_tokens=False).ids) != [
            llm.eos_id
        ]:
            wrong.append(f'end: the model expects id {llm.eos_id}, "\\n" has the ids {end}')
        for name, wanted in sorted(expected.items()):
            actual = getattr(self.llm, f"{name}_token_id")
            if actual != wanted:
                token = getattr(self.llm, f"{name}_token")
                wrong.append(
                    f"{name}: the model expects id {wanted}, the tokenizer has {actual} ({token!r})"
                )
        read = self.variant.reads_instruction
        if read and self.qformer is None:
            return [*wrong, "the Q-Former reads the instruction, but has no tokenizer"]
        for name, wanted in (("cls", "[CLS]"), ("sep", "[SEP]")) if read else ():
            if (token := getattr(self.qformer, f"{name}_token")) != wanted:
                wrong.append(f"{name}: the Q-Former expects {wanted}, its tokenizer has {token!r}")
        for name, tokenizer, vocab in (
            ("language model", self.llm, llm.vocab),
            ("Q-Former", self.qformer, self.variant.qformer.vocab if read else 0),
        )[: 1 + read]:
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


def _keep_left(ids: list[int], limit: int) -> tuple[list[int], bool]:
    return ids[:limit], len(ids) > limit


def _keep_right(ids: list[int], limit: int) -> tuple[list[int], bool]:
    return ids[max(len(ids) - limit, 0) :], len(ids) > limit


def _int32(values: Sequence[Any]) -> np.ndarray:
    return np.array(values, np.int32)
