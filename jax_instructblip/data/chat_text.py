r"""The text of a model that is asked by a chat template: its prompts and the ends of its answers.

    "What is it?", one image        user: <image>\nWhat is it?
    "Is <image> left of <image>?"   user: Is <image> left of <image>?
    user, assistant, user ...       a conversation, asked its last question

An answer ends with the end token of the tokenizer, or with the stop of the template. That is one
control token (`<|eot_id|>`), or a text (`###`) that the model may spell in several ways.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

import numpy as np

from jax_instructblip.data.byte_tokenizers import letter_bytes
from jax_instructblip.data.conversation import (
    IMAGE,
    USER,
    Conversation,
    ConversationProcessor,
    Turn,
)
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.text import BYTE_PIECE, TextProcessor
from jax_instructblip.fields import text_problem
from jax_instructblip.models.variants import OptConfig, Variant

Prompt = str | Conversation | Sequence[Turn]  # turns are Turn or (speaker, text)

_SHOWN = 40  # characters of a prompt that name it in errors


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTextProcessor(TextProcessor):
    """A text processor whose prompts are conversations, written by `input_format.template`."""

    @classmethod
    def of(cls, text: TextProcessor) -> "ChatTextProcessor":
        """Returns the processor with the fields of another one, whose format has a template."""
        return cls(**{field.name: getattr(text, field.name) for field in dataclasses.fields(text)})

    def __post_init__(self):
        super().__post_init__()
        _ = self.chat  # a template of another tokenizer is refused now

    def with_limit(self, limit: int) -> "ChatTextProcessor":
        """Returns a copy with another `InputFormat.limit`."""
        form = dataclasses.replace(self.input_format, limit=limit)
        return dataclasses.replace(self, input_format=form)

    @functools.cached_property
    def chat(self) -> ConversationProcessor:
        """The processor that writes prompts as conversations in the template."""
        each = self.input_format
        settings = dict(limit=each.limit, system=each.system, image_marks=each.image_marks)
        return ConversationProcessor.for_model(self, each.template, **settings)

    def prompt(self, prompt: Prompt, images: int = 1) -> dict[str, np.ndarray]:
        """Returns an example for inference, as `TextProcessor.prompt`, with `image_at` [images].

        `prompt` is a question, or a conversation that ends with one. If no question has an
        `<image>`, all images stand before the first one; else there must be one `<image>` an image.

        Raises:
            ValueError: the conversation cannot be used; all reasons are listed.
        """
        return self.chat.prompt(as_conversation(prompt, images))

    def candidate(self, answer: str) -> np.ndarray:
        """Returns the ids [T] int32 of a candidate answer without stop, as they follow a prompt."""
        if IMAGE in answer:
            raise ValueError(f"the answer {answer[:80]!r} has an {IMAGE}: images stand in prompts")
        return np.array(self.chat.candidate(answer), np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of generated ids up to the stop, without outer white space."""
        ids = [int(i) for i in ids]
        end = next((index for index, i in enumerate(ids) if i in self.stop_ids), len(ids))
        text = self._text(ids[:end])
        return (text.partition(self.stop_text)[0] if self.stop_text else text).strip()

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: the tokenizer's end token, the template's control token."""
        template, control = self.chat.template, self.llm.get_added_vocab()
        ends = [control[part] for part in template.split(template.stop) if part in control]
        return frozenset(i for i in (self.llm.eos_token_id, *ends) if isinstance(i, int))

    @functools.cached_property
    def stop_text(self) -> str:
        """The text that ends an answer; "" for a template whose stop is a control token.

        White space around the template's stop is removed, unless the stop is white space alone.
        """
        template, control = self.chat.template, self.llm.get_added_vocab()
        text = "".join(part for part in template.split(template.stop) if part not in control)
        return text.strip() or text

    def stop_table(self) -> np.ndarray | None:
        """Returns the table [S, V] int8 by which decoding finds the end of an answer.

        Entry [s, i] is the state after token i, if it was s. A state is the number of bytes of
        `stop_text` that the answer so far ends with; S stands for an answer that has ended. If
        `stop_text` is "", S is 1. With the stop `###` (S = 3), in SentencePiece:

                  #   ##  ###  a  </s>
            0     1   2   3    0  3         `</s>` ends an answer in any state
            1     2   3   3    0  3
            2     3   3   3    0  3

        None if the model's own end token is all that ends an answer.
        """
        if not self.stop_text and self.stop_ids == {self.variant.llm.eos_id}:
            return None
        word = self.stop_text.encode()
        size = max(len(word), 1)
        table = np.zeros((size, self.variant.llm.vocab), np.int8)
        letters = set(word)
        for i, piece in enumerate(self._pieces() if word else ()):
            if piece is None:
                table[:, i] = np.arange(size)  # it is left out of the text
            elif letters & set(piece):
                table[:, i] = [_matched(word, state, piece) for state in range(size)]
        table[:, list(self.stop_ids)] = size
        return table

    def _pieces(self) -> list[bytes | None]:
        """Returns the bytes of each id's text; None for ids that `decode` leaves out."""
        vocab = self.variant.llm.vocab
        added = self.llm.added_tokens_decoder
        hidden = {*self.llm.all_special_ids, *(i for i, each in added.items() if each.special)}
        of_bytes = self._bytewise or isinstance(self.variant.llm, OptConfig)
        letters = letter_bytes() if of_bytes else {}
        pieces: list[bytes | None] = []
        for i, piece in enumerate(self.llm.convert_ids_to_tokens(list(range(vocab)))):
            if piece is None or i in hidden or (i == 0 and not letters):
                pieces.append(None)
            elif letters and i not in added:
                pieces.append(bytes(letters[letter] for letter in piece))
            elif (byte := BYTE_PIECE.fullmatch(piece)) and not letters:
                pieces.append(bytes([int(byte[1], 16)]))
            else:
                pieces.append(piece.replace("▁", " ").encode())
        return pieces


def as_conversation(prompt: Prompt, images: int) -> Conversation:
    """Returns a prompt as a conversation about `images` images, each of which has its place."""
    if isinstance(prompt, str):
        conversation = Conversation(prompt[:_SHOWN], (Turn(USER, prompt),), images)
    elif isinstance(prompt, Conversation):
        turns = tuple(Turn(*turn) for turn in prompt.turns)
        conversation = dataclasses.replace(prompt, turns=turns, images=images)
    else:
        turns = tuple(Turn(*turn) for turn in prompt)
        conversation = Conversation(turns[-1].text[:_SHOWN] if turns else "", turns, images)
    return conversation.placed()


def prompt_problem(prompt: object) -> str:
    """Returns the reason why a value is no prompt of a chat; "" if it is one."""
    if isinstance(prompt, str):
        return text_problem(prompt)
    if isinstance(prompt, Conversation):
        if not isinstance(prompt.system, str | None):
            return f"has the system message {prompt.system!r:.60}, expected a text or None"
        if problem := text_problem(prompt.system or ""):
            return f"has a system message that {problem}"
        if not prompt.turns and isinstance(prompt.turns, list | tuple):
            return ""  # it has problems of its own
        prompt = prompt.turns
    is_turn = lambda turn: (
        isinstance(turn, list | tuple)
        and len(turn) == 2
        and all(isinstance(each, str) for each in turn)
    )
    if isinstance(prompt, list | tuple) and prompt and all(map(is_turn, prompt)):
        return ""
    return (
        f"is {prompt!r:.60}, expected a text, a Conversation or a list of its turns, each "
        '("user", text) or ("assistant", text)'
    )


def load_text_processor(
    folder: str | os.PathLike[str], variant: Variant, input_format: InputFormat, **limits: int
) -> TextProcessor:
    """Returns the processor of a checkpoint folder for a model that is asked by `input_format`.

    It is a `ChatTextProcessor` if the format has a template. `limits` are the fields of
    `TextProcessor` that end with `_limit`.

    Raises:
        ValueError: the chat template is of another tokenizer, or needs another language model.
    """
    kind = ChatTextProcessor if input_format.template else TextProcessor
    return kind.load(folder, variant, input_format=input_format, **limits)


def _matched(word: bytes, state: int, piece: bytes) -> int:
    """Returns the state after a piece: how many bytes of `word` it ends with; all: an end."""
    text = word[:state] + piece
    if word in text:
        return len(word)
    return next(n for n in range(len(word) - 1, -1, -1) if text.endswith(word[:n]))
