r"""Turns a conversation about images into token ids and the targets of the loss.

    user        <image>\nWhat?
    assistant   A cat

    tokens      <s> ... USER : \n What ? ASSISTANT : A cat </s>
    targets      .       .  .  .   .   .     .     . A cat </s>    a dot is IGNORE: not learned
    image_at                   ^ the image's vectors go before this token

Ids and targets grow together, turn by turn: every part of the text is encoded once, as learned or
as not learned. Other programs search the finished ids for the answers. That fails silently where
the tokenizer splits an answer alone differently from the same answer in the whole text.

`<image>` in a question marks the place of an image. Templates are rows of `chat_templates.py`.
Examples have the layout that `batch.py` describes, for decoder-only language models.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_instructblip.data.chat_templates import (
    IMAGES,
    LIMIT,
    ORDERS,
    START,
    SYSTEM,
    TEXT,
    get_chat_template,
)
from jax_instructblip.data.piece_encoder import PieceEncoder, PieceWriter, reads_as_legacy
from jax_instructblip.data.records import Record, RecordError
from jax_instructblip.data.spec import IGNORE
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.data.tokenizer_files import Tokenizer
from jax_instructblip.fields import text_problem

IMAGE = "<image>"
USER, ASSISTANT = "user", "assistant"


class Turn(NamedTuple):
    """One turn: the speaker ("user" or "assistant") and the text; `<image>` in it is an image."""

    speaker: str
    text: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The turns of a user and an assistant about some images.

    Attributes:
      id: the name of the conversation in errors.
      turns: the user speaks first, then they take turns. In training the assistant speaks last, in
        a prompt the user.
      images: number of its images; as many `<image>` stand in the questions, in the same order.
      system: the system message; None means the template's, "" that there is none.
    """

    id: str
    turns: tuple[Turn, ...]
    images: int = 0
    system: str | None = None

    @classmethod
    def from_record(cls, record: Record) -> "Conversation":
        """Returns the conversation of a record: its history, then its question and first answer.

        Without an answer the result is a prompt. If no question has an `<image>`, all images stand
        before the first question.
        """
        rounds = [*record.history, (record.prompt, *record.answers[:1])]
        texts = [text for each in rounds for text in each]
        speakers = (USER, ASSISTANT)
        turns = tuple(Turn(speakers[index % 2], text) for index, text in enumerate(texts))
        return cls(record.id, turns, len(record.images)).placed()

    def placed(self) -> "Conversation":
        """Returns a copy with all images before the first question, if no question has an image."""
        if not self.turns or any(IMAGE in turn.text for turn in self.turns[::2]):
            return self
        return _with_images(self, self.images, "first")

    def ordered(self, order: str, rng: np.random.Generator) -> "Conversation":
        """Returns the conversation with the first question's images before or after its text.

        Args:
          order: one of `ORDERS`; "written" changes nothing.
          rng: generator for the order "drawn", which takes "first" or "last", evenly.

        Raises:
          ValueError: `order` is unknown.
        """
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}, expected one of {', '.join(ORDERS)}")
        if order == "drawn":
            order = ("first", "last")[int(rng.integers(2))]
        count = self.turns[0].text.count(IMAGE) if self.turns else 0
        return self if order == "written" else _with_images(self, count, order)

    def problems(self, *, answered: bool) -> Iterator[str]:
        """Yields the reasons why the conversation cannot be used.

        It must end with an answer if `answered`, else with a question.
        """
        if not self.turns:
            yield "it has no turns, expected a question" + " and an answer" * answered
        for index, (speaker, text) in enumerate(self.turns):
            name, expected = f"turn {index + 1}", (USER, ASSISTANT)[index % 2]
            if speaker not in (USER, ASSISTANT):
                yield f"{name}: the speaker is {speaker!r}, expected {USER} or {ASSISTANT}"
            elif speaker != expected:
                taking = "starts" if index == 0 else "takes the next turn"
                yield f"{name}: the speaker is {speaker!r}, but the {expected} {taking}"
            if problem := text_problem(text):
                yield f"{name}: the text {problem}"
            if not text.strip():
                yield f"{name}: the text of the {speaker} is empty"
            if expected == ASSISTANT and IMAGE in text:
                yield f"{name}: an answer has an {IMAGE}; images stand in questions"
        if self.turns and len(self.turns) % 2 == answered:
            yield (
                f"it has {len(self.turns)} turns, the last of which is "
                + ("a question without an answer" if answered else "an answer, expected a question")
            )
        if IMAGE in (self.system or ""):
            yield f"the system message has an {IMAGE}; images stand in questions"
        marks = sum(turn.text.count(IMAGE) for turn in self.turns[::2])
        if marks < self.images:
            yield (
                f"it has {self.images} images, but {marks} {IMAGE} in its questions: each image "
                "needs one"
            )
        elif marks > self.images:
            yield f"it has {marks} {IMAGE} in its questions, but {self.images} images"


class Encoded(NamedTuple):
    """A conversation in tokens.

    Attributes:
      tokens: ids of the text.
      targets: the same id where it is learned, else IGNORE.
      turns: for each token the number of its turn, 1 for the first and all that precedes it.
      image_at: for each image the index of the token before which it stands.
    """

    tokens: list[int]
    targets: list[int]
    turns: list[int]
    image_at: list[int]


class ConversationProcessor:
    """Turns conversations into examples, by one template and the tokenizer of a language model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        *,
        visual_tokens: int,
        limit: int = LIMIT,
        legacy: bool = True,
        system: str | None = None,
        image_marks: tuple[str, str] | None = None,
    ):
        """Sets how conversations are written.

        Args:
          tokenizer: the language model's.
          template: key of `CHAT_TEMPLATES`.
          visual_tokens: number of vectors that an image becomes.
          limit: most slots of a training sample, text tokens and visual vectors together.
          legacy: the answer of `reads_as_legacy` for the tokenizer's folder; a template with an
            answer of its own ignores it.
          system: the system message of conversations without one; None means the template's.
          image_marks: control tokens before and after each image, such as `<im_start>` and
            `<im_end>`.

        Raises:
          ValueError: the template is unknown or of another tokenizer, or a value is out of range.
        """
        self.template = get_chat_template(template, tokenizer)
        self.name, self.tokenizer, self.limit = template, tokenizer, limit
        if visual_tokens < 1 or limit < 1:
            raise ValueError(
                f"visual_tokens is {visual_tokens} and limit {limit}, expected at least 1"
            )
        self.visual_tokens = visual_tokens
        self.system = self.template.message if system is None else system
        own = self.template.legacy
        self._legacy = legacy if own is None else own
        self._pieces = PieceEncoder(tokenizer)
        self._instruct: Callable[[str], dict[str, np.ndarray]] | None = None
        control = tokenizer.get_added_vocab()
        if missing := [mark for mark in image_marks or () if mark not in control]:
            raise ValueError(
                f"image_marks has {', '.join(missing)}, which the tokenizer has not as a control "
                "token: add it, or train without image marks"
            )
        self._image_marks = tuple(control[mark] for mark in image_marks or ())
        self._control = {token: control[token] for token in self.template.tokens}
        if isinstance(tokenizer.bos_token_id, int):
            self._control[START] = tokenizer.bos_token_id

    @classmethod
    def for_model(
        cls, text: TextProcessor, template: str, **options: Any
    ) -> "ConversationProcessor":
        """Returns the processor of the model of `text`, which gives tokenizer and visual vectors.

        `options` are the constructor's arguments after these; without `legacy`, the tokenizer's
        folder decides (`reads_as_legacy`).

        Raises:
            ValueError: the language model is an encoder-decoder; or for the reasons that the
                constructor gives.
        """
        llm = text.variant.llm
        if llm.encoder_decoder:
            raise ValueError(
                f"the chat template {template!r} needs a decoder-only language model, {llm.kind} "
                "is an encoder-decoder: use a model with LLaMA, OPT or another of that kind"
            )
        options.setdefault("legacy", reads_as_legacy(text.llm.name_or_path))
        processor = cls(text.llm, template, visual_tokens=text.variant.visual_tokens, **options)
        if text.variant.reads_instruction:
            processor._instruct = functools.partial(TextProcessor.prompt, text)
        return processor

    def example(
        self, conversation: Conversation, room: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns a training example without images; all arrays are int32.

        Its keys are `tokens`, `targets`, `image_at`, `truncated` [3], and `qformer_tokens` for a
        Q-Former that reads the instruction, which is the first question. A sample of more than
        `limit` slots loses tokens on its right. `truncated` has a 1 for each text that was cut: the
        Q-Former's instruction, tokens that are not learned (questions), learned ones (answers). If
        `room` is given, the limits are that example's numbers of slots and targets instead.

        Raises:
            ValueError: the conversation cannot be used, or has no target or not all of its images
                within the limit. The message names the conversation.
        """
        encoded = self.encode(conversation, answered=True)
        tokens, targets = _int32(encoded.tokens), _int32(encoded.targets)
        at, visual = _int32(encoded.image_at), self.visual_tokens
        limit, most = self.limit, len(tokens)
        if room is not None:
            limit = len(room["tokens"]) + visual * len(room["image_at"])
            most = int((room["targets"] != IGNORE).sum())
        learned = targets != IGNORE
        index = np.arange(len(tokens))
        slots = index + visual * np.searchsorted(at, index, side="right")
        kept = int(((slots < limit) & (np.cumsum(learned) <= most)).sum())
        ends = at + visual * (1 + np.arange(len(at)))
        size = f"{len(tokens)} tokens and {len(at)} images of {visual}"
        if (behind := np.flatnonzero((ends > limit) | (at > kept))).size:
            raise ValueError(
                f"conversation {conversation.id!r}: image {behind[0] + 1} of {len(at)} ends at "
                f"slot {ends[behind[0]]}, beyond the limit of {limit} ({size}): shorten the "
                "text before it or raise the limit"
            )
        if not learned[:kept].any():
            raise ValueError(
                f"conversation {conversation.id!r} has no target in its first {limit} of "
                f"{len(tokens) + visual * len(at)} slots ({size}): there is nothing to learn "
                "from. Shorten its first question or raise the limit"
            )
        instruction, cut = self._instruction(conversation)
        lost = learned[kept:]
        truncated = [cut, bool((~lost).any()), bool(lost.any())]
        text = {"tokens": tokens[:kept], "targets": targets[:kept], **instruction}
        return text | {"image_at": at, "truncated": _int32(truncated)}

    def prompt(self, conversation: Conversation) -> dict[str, np.ndarray]:
        """Returns an example for inference: as `example`, without `targets` and without `limit`.

        The conversation ends with a question, the tokens with the template's mark of an answer. The
        Q-Former's instruction may still be cut.

        Raises:
            ValueError: the conversation cannot be used; the message names it.
        """
        encoded = self.encode(conversation, answered=False)
        instruction, cut = self._instruction(conversation)
        text = {"tokens": _int32(encoded.tokens), **instruction}
        return text | {"image_at": _int32(encoded.image_at), "truncated": _int32([cut, 0, 0])}

    def candidate(self, answer: str) -> list[int]:
        """Returns the ids of an answer without its stop, as they follow those of any prompt."""
        turns = (Turn(USER, IMAGE), Turn(ASSISTANT, answer))
        before = len(self._write(turns[:1], "").tokens)
        return self._write(turns, "", stopped=False).tokens[before:]

    def fingerprint(self) -> str:
        """Returns a text of all settings that change the tokens of a conversation."""
        settings = (self.template, self.system, self.limit, self._legacy, self._image_marks)
        return repr((*settings, self.visual_tokens))

    def encode(self, conversation: Conversation, *, answered: bool) -> Encoded:
        """Returns the tokens of a conversation that ends with an answer or with a question.

        Raises:
            RecordError: the conversation cannot be used; all reasons are listed.
        """
        problems = list(conversation.problems(answered=answered))
        if not self.template.reads_questions and not problems:
            problems += self._caption_problems(conversation)
        if problems:
            raise RecordError(f"conversation {conversation.id!r} cannot be used:", problems)
        system = self.system if conversation.system is None else conversation.system
        return self._write(conversation.turns, system)

    def _instruction(self, conversation: Conversation) -> tuple[dict[str, np.ndarray], bool]:
        """Returns the Q-Former's instruction and True if it was cut.

        The instruction is {"qformer_tokens": ids}, or {} for a Q-Former that reads none.
        """
        if self._instruct is None:
            return {}, False
        question = conversation.turns[0].text.replace(IMAGE, "").strip()
        example = self._instruct(question)
        return {"qformer_tokens": example["qformer_tokens"]}, bool(example["truncated"][0])

    def _caption_problems(self, conversation: Conversation) -> Iterator[str]:
        """Yields the reasons why a template without questions cannot write the conversation."""
        if len(conversation.turns) > 2:
            yield (
                f"it has {len(conversation.turns)} turns, but the template {self.name!r} reads no "
                "questions: expected an image and its caption"
            )
        if not conversation.images:
            yield f"it has no image, but the template {self.name!r} reads nothing else"

    def _write(self, turns: Sequence[Turn], system: str, *, stopped: bool = True) -> Encoded:
        """Returns the tokens of the turns, written by the template; answers may lack their stop."""
        template, writer = self.template, PieceWriter(self._pieces, legacy=self._legacy)
        learns_marks, answer = template.learns_marks, template.answer + template.stop * stopped
        header = template.system.replace(SYSTEM, system) if system else ""
        self._fill(writer, template.start)
        if SYSTEM not in template.user:
            self._fill(writer, template.system if system else "", system=system)
            header = ""
        # Without a system message, nothing may stand before the opening that could predict it.
        self._fill(writer, template.opening, learned=learns_marks and bool(system))
        for index, (speaker, text) in enumerate(turns):
            # The first question and the system message are encoded as one text. An answer is
            # encoded apart from the question, as in generation, where the prompt ends before it.
            if index:
                writer.start_turn(index + 1)
            if speaker == USER:
                self._fill(writer, template.between if index else "")
                self._fill(writer, template.user, text=text, system=header)
                self._fill(writer, template.mark, learned=learns_marks)
                header = ""
            else:
                self._fill(writer, answer, learned=True, text=text)
        if turns[-1].speaker == ASSISTANT and stopped:
            self._fill(writer, template.end, learned=learns_marks)
        writer.flush()
        return Encoded(writer.tokens, writer.targets, writer.turns, writer.image_at)

    def _fill(
        self, writer: PieceWriter, pattern: str, *, learned: bool = False, text="", system=""
    ) -> None:
        """Writes one field of the template, with its placeholders filled."""
        for part in self.template.split(pattern):
            if part in self._control:
                writer.control(self._control[part], learned, starts=part == START)
            elif part in (TEXT, IMAGES):
                for index, piece in enumerate(text.split(IMAGE)):
                    if index:
                        writer.image(self._image_marks)
                    writer.text(piece if part == TEXT else "", learned)
            elif part != START:  # left out: the tokenizer has no start token
                writer.text(system if part == SYSTEM else part, learned)


def _with_images(conversation: Conversation, count: int, order: str) -> Conversation:
    """Returns a copy with `count` images before ("first") or after ("last") the first question."""
    speaker, text = conversation.turns[0]
    marks = "\n".join([IMAGE] * count)
    bare = text.replace(IMAGE, "").strip() if count else text
    parts = [marks, bare] if order == "first" else [bare, marks]
    first = Turn(speaker, "\n".join(filter(None, parts)))
    return dataclasses.replace(conversation, turns=(first, *conversation.turns[1:]))


def _int32(values: Sequence[int] | Sequence[bool]) -> np.ndarray:
    return np.array(values, np.int32)
