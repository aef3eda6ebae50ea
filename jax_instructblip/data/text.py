r"""Turns prompt and answer into token ids and targets of one example; plain numpy.

    T5      tokens          prompt ... </s>                  the encoder's input
            decoder_tokens  <pad> answer ...                 targets shifted right by one
            targets         answer ... </s>

    LLaMA   tokens          </s> prompt ... answer ... </s>
            targets          .   .      ... answer ... </s>  a dot is IGNORE: not learned

    OPT     tokens          </s> prompt ... answer ... \n
            targets          .   .      ... answer ... \n    "\n" is its end token

    all     qformer_tokens  [CLS] prompt ... [SEP]           only if the Q-Former reads text

In training a prompt that is too long loses tokens on its left (BLIP-2's on its right) and an answer
loses them on its right, at the limits of LAVIS (the code released with the paper). In inference the
language model's prompt is not cut. Nothing is padded here, and images have no tokens: `batch.py`
adds both when it makes a batch.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import decoders

from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.spec import IGNORE
from jax_instructblip.data.tokenizer_files import (
    MaybeTokenizer,
    Tokenizer,
    decodes_bytes,
    has_unknown,
    load_tokenizers,
    tokenizer_folders,
)
from jax_instructblip.fields import text_problem
from jax_instructblip.models.variants import LlamaConfig, OptConfig, T5Config, Variant

# The texts that an example's `truncated` [3] is about, in order.
TRUNCATED = ("instruction", "prompt", "answer")

# Placeholders of images in the prompts of other programs; here an image has no token in the text.
_PLACEHOLDERS = ("<image>", "<video>")

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # a piece of SentencePiece that is one byte


class Limits(NamedTuple):
    """The largest numbers of tokens of an instruction (for the Q-Former), prompt and answer."""

    instruction: int
    prompt: int
    answer: int


@dataclasses.dataclass(frozen=True, eq=False)
class TextProcessor:
    """Turns text into the token ids of one model variant, and ids back into text.

    Attributes:
      variant: sizes and special ids; the tokenizers are checked against them.
      llm: the language model's tokenizer.
      qformer: the Q-Former's tokenizer (BERT); None where it does not read the instruction.
      qformer_limit: most ids of an instruction for the Q-Former, [CLS] and [SEP] included.
      prompt_limit: most ids of a training prompt for the language model, `</s>` included.
      answer_limit: most ids of a training answer, end token included. As in LAVIS, for LLaMA and
        OPT this limit also counts a `</s>` before the answer that is then dropped, so that one id
        less is kept; an answer that is cut has no end token there, while T5's keeps it.
      input_format: how prompts and images are put to the model; `chat_text.py` reads its template.
    """

    variant: Variant
    llm: Tokenizer
    qformer: MaybeTokenizer
    qformer_limit: int = 128
    prompt_limit: int = 128
    answer_limit: int = 256
    input_format: InputFormat = InputFormat()

    def __post_init__(self):
        wrong = [*self._wrong_ids(), *self._wrong_limits()]
        if wrong:
            raise ValueError("the tokenizers do not belong to this model:\n  " + "\n  ".join(wrong))

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], variant: Variant, **fields: Any
    ) -> "TextProcessor":
        """Returns the processor of a checkpoint folder, either of this package or of Hugging Face.

        `fields` are other attributes of the class: the limits and `input_format`.

        Raises:
            FileNotFoundError: a tokenizer has no files.
            ValueError: a tokenizer is damaged or belongs to another model, or a limit is wrong.
        """
        llm, qformer = tokenizer_folders(folder)
        qformer = qformer if variant.reads_instruction else None
        released = variant.kind if variant.kind == "llava" else None
        both = load_tokenizers(llm, qformer, variant.llm.kind, released=released)
        return cls(variant, *both, **fields)

    def example(
        self,
        prompt: str,
        answer: str,
        room: Mapping[str, np.ndarray] | None = None,
        *,
        learn_start: bool = True,
    ) -> dict[str, np.ndarray]:
        """Returns a training example without images, with the int32 arrays drawn at the top.

        Its `truncated` [3] is 1 where the prompt for the Q-Former, the prompt for the language
        model or the answer lost tokens to its limit. With `room`, another example, the lengths of
        its texts are the limits instead.

        OPT reads prompt and answer as one text with a space between them. Without a prompt, its
        first `</s>` is a target as well, predicted at the last visual vector (so LAVIS trains
        BLIP-2's second stage); `learn_start=False` turns this off.

        Raises:
            ValueError: the answer has no tokens, or a text cannot be read.
        """
        limits = self._limits(room)
        if isinstance(self.variant.llm, T5Config):
            return self._t5_example(self.variant.llm, prompt, answer, limits)
        return self._decoder_example(self.variant.llm, prompt, answer, limits, learn_start)

    def prompt(self, prompt: str, images: int = 1) -> dict[str, np.ndarray]:
        """Returns an example for inference, without images and targets; all arrays are int32.

        Its keys are `tokens`, which are not cut, `qformer_tokens` if the Q-Former reads text, and
        `truncated` [3] as in `example`. Only the first of these three, that of the instruction for
        the Q-Former, can be 1. The number of `images`, all before the text, changes nothing.
        """
        llm = self.variant.llm
        ids = self._llm_ids(prompt)
        ids = [*ids, llm.eos_id] if isinstance(llm, T5Config) else [llm.bos_id, *ids]
        instruction, cut = self._instruction_part(prompt, self.qformer_limit)
        return {"tokens": _int32(ids), **instruction, "truncated": _int32([cut, False, False])}

    def candidate(self, answer: str) -> np.ndarray:
        """Returns the ids [T] int32 of a candidate answer whose likelihood is to be ranked.

        Only T5's ids end with an end token. As in LAVIS, nothing is cut, and white space at the end
        is kept (in training it is removed). Ids of OPT, and of tokenizers of bytes, start with the
        space that stands between prompt and answer.
        """
        llm = self.variant.llm
        ids = self._llm_ids(f" {answer}" if self._spaced and answer else answer)
        return _int32([*ids, llm.eos_id] if isinstance(llm, T5Config) else ids)

    def instruction(self, prompt: str) -> np.ndarray:
        """Returns the ids [L] int32 of a Q-Former's text: [CLS] prompt [SEP], cut on the left."""
        _require_readable(prompt)
        return self._instruction(prompt, self.qformer_limit)[0]

    def has_unknown(self, name: str, text: str) -> bool:
        """Tells whether a text has characters that the tokenizer maps to `<unk>`.

        `name` says which text it is, one of `TRUNCATED`: an instruction is read by the Q-Former's
        tokenizer, the others by the language model's.
        """
        return has_unknown(self.qformer if name == "instruction" else self.llm, text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of generated ids, without special tokens and outer white space."""
        return self._text([int(i) for i in ids]).strip()

    def _text(self, ids: list[int]) -> str:
        """The text of generated ids without special tokens."""
        if self._bytewise:
            return str(self.llm.backend_tokenizer.decode(ids, skip_special_tokens=True))
        if isinstance(self.variant.llm, T5Config):
            return str(self.llm.decode(ids, skip_special_tokens=True))
        if isinstance(self.variant.llm, OptConfig):
            # As in LAVIS " ." becomes "."; transformers 5 has a function for it, but no setting.
            text = self.llm.backend_tokenizer.decode(ids, skip_special_tokens=True)
            return self.llm.clean_up_tokenization(text)
        # As in LAVIS, a finished beam is padded with 0, which must not be decoded as <unk>.
        ids = [self.variant.llm.eos_id if i == 0 else i for i in ids]
        pieces = self.llm.convert_ids_to_tokens(ids, skip_special_tokens=True)
        # A model may have more embeddings than its tokenizer has ids; such an id has no piece.
        return _join_pieces([piece for piece in pieces if piece is not None])

    stop_text = ""  # the text that ends an answer, beside the end token

    def stop_table(self) -> np.ndarray | None:
        """Returns None: the end token is all that ends an answer."""

    @property
    def rewrites(self) -> bool:
        """Tells whether the end of a decoded text may change when more ids follow.

        Streaming then has to hold the end back. For OPT it is always so, and for tokenizers of
        bytes, whose characters may be split; for LLaMA never; a T5 folder may ask for it
        (`clean_up_tokenization_spaces`) or bring a decoder of its own.
        """
        if self._bytewise:
            return True
        if not isinstance(self.variant.llm, T5Config):  # `_join_pieces` never changes earlier text
            return isinstance(self.variant.llm, OptConfig)
        plain = isinstance(self.llm.backend_tokenizer.decoder, decoders.Metaspace)
        return not plain or bool(getattr(self.llm, "clean_up_tokenization_spaces", False))

    @functools.cached_property
    def _bytewise(self) -> bool:
        """True for the tokenizers of Llama 3 and Qwen, whose pieces are bytes."""
        return isinstance(self.variant.llm, LlamaConfig) and decodes_bytes(self.llm)

    @property
    def _spaced(self) -> bool:
        """True if a space between prompt and answer is a part of the answer's first piece."""
        return isinstance(self.variant.llm, OptConfig) or self._bytewise

    def _limits(self, room: Mapping[str, np.ndarray] | None) -> Limits:
        if room is None:
            return Limits(self.qformer_limit, self.prompt_limit, self.answer_limit)
        instruction, tokens = len(room.get("qformer_tokens", ())), len(room["tokens"])
        answer = int((room["targets"] != IGNORE).sum())
        if isinstance(self.variant.llm, T5Config):
            return Limits(instruction, tokens, answer)
        prompt = max(tokens - answer, 1)  # counts the first `</s>`, even if it is a target
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
        if self._spaced:
            # In one text, the tokenizer counts a space to the word behind it.
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
        """Returns ({"qformer_tokens": ids} of a prompt, True if it was cut).

        Where the Q-Former reads no text it returns ({}, False).
        """
        if not self.variant.reads_instruction:
            return {}, False
        ids, cut = self._instruction(prompt, limit)
        return {"qformer_tokens": ids}, cut

    def _instruction(self, prompt: str, limit: int) -> tuple[np.ndarray, bool]:
        ids = self.qformer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
        ids, cut = _keep_right(ids, limit - 2)
        return _int32([self.qformer.cls_token_id, *ids, self.qformer.sep_token_id]), cut

    def _prompt_ids(self, prompt: str, limit: int) -> tuple[list[int], bool]:
        """Returns (at most `limit` ids of a training prompt, True if it was cut)."""
        keep = _keep_left if self.variant.kind == "blip2" else _keep_right
        return keep(self._llm_ids(prompt), limit)

    def _answer_ids(self, answer: str) -> list[int]:
        # Right-stripped: LAVIS appends "</s>" to the text of a LLaMA answer, whose tokenizer
        # removes the white space in front of "</s>"; T5 drops white space anyway.
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
        reads = self.variant.reads_instruction
        positions = self.variant.qformer.max_positions if reads else None
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
    """Returns the text of SentencePiece pieces; byte pieces in a row, such as `<0x0A>`, are UTF-8.

    A byte that is not valid UTF-8 becomes U+FFFD, as in SentencePiece; the decoder of transformers
    would replace all byte pieces of the row for one bad byte.
    """
    data = bytearray()
    for piece in pieces:
        byte = BYTE_PIECE.fullmatch(piece)
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
