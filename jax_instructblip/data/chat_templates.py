r"""The chat templates of language models, as rows of a table, and the tokenizers that they fit.

    v0       {system}\n\n### Human: {question}\n### Assistant: {answer}\n### ...
    v1       {system} USER: {question} ASSISTANT: {answer}</s>USER: ...
    plain    {image}{answer}\n
    llama3   ...<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>...
    chatml   ...<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>
    mistral  [INST] {system}{question} [/INST] {answer}</s>[INST] ...

The texts are those with which LLaVA (v0, v1, plain) and the language models of those names were
trained. `conversation.py` turns them into token ids.
"""

import dataclasses
import re
from typing import TYPE_CHECKING

from jax_instructblip import lookup

if TYPE_CHECKING:  # a verb's --help reads this table, and imports nothing slow
    from jax_instructblip.data.tokenizer_files import Tokenizer

START, TEXT, SYSTEM, IMAGES = "{start}", "{text}", "{system}", "{images}"
LIMIT = 2048  # slots of a sample, text tokens and visual vectors, in LLaVA's recipes
# Order of images and question in the first turn. "drawn" is one of "first" and "last", evenly, as
# LLaVA's first instructions were written.
ORDERS = ("written", "first", "last", "drawn")
PLACEHOLDERS = (START, TEXT, SYSTEM, IMAGES)

_SYSTEM_V0 = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
_SYSTEM_V1 = _SYSTEM_V0.replace("human", "user")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The texts and control tokens around the turns of a conversation.

    Attributes:
      user: a question; `{text}` is its text with its images, `{images}` its images alone.
        `{system}`, if it has one, is `system` in the first question and nothing in later ones.
      mark: the text before an answer. A prompt ends with it, so an answer's tokens follow it.
      answer: an answer; `{text}` is its text.
      stop: the end of an answer, at which generation stops. Answer and stop are learned.
      system: how the system message `{system}` is written, unless it is empty.
      message: the system message of conversations that have none of their own.
      opening: text before the first question.
      between: text between an answer and the next question.
      end: text after the last answer.
      tokens: the control tokens in these texts, each of which the tokenizer must have.
      start: the first text of all; `{start}` is the tokenizer's own start token, if it has one.
      learns_marks: whether `opening`, `mark` and `end` are learned as well.
      legacy: the answer of `reads_as_legacy` for all tokenizers of this template; None leaves it
        to their folders.
    """

    user: str
    mark: str
    answer: str
    stop: str
    system: str = SYSTEM
    message: str = ""
    opening: str = ""
    between: str = ""
    end: str = ""
    tokens: tuple[str, ...] = ()
    start: str = START
    learns_marks: bool = False
    legacy: bool | None = None

    @property
    def reads_questions(self) -> bool:
        """Tells whether the model gets the text of a question, and not only its images."""
        return TEXT in self.user

    def split(self, text: str) -> list[str]:
        """Splits a field into control tokens, placeholders and the texts between them."""
        marks = "|".join(map(re.escape, (*PLACEHOLDERS, *self.tokens)))
        return [part for part in re.split(f"({marks})", text) if part]

    def problems(self, tokenizer: "Tokenizer") -> list[str]:
        """Returns the reasons why the template does not fit the tokenizer; [] if it fits."""
        control = tokenizer.get_added_vocab()
        problems = [
            f"it has no control token {token!r}" for token in self.tokens if token not in control
        ]
        fields = (self.system, self.opening, self.user, self.mark, self.answer, self.stop)
        parts = [part for text in (*fields, self.between, self.end) for part in self.split(text)]
        for part in parts:
            if part in (*PLACEHOLDERS, *self.tokens):
                continue
            problems += [
                f"{token!r} is a control token of it, but ordinary text of the template"
                for token in control
                if token in part and token.strip()
            ]
            ids = tokenizer.backend_tokenizer.encode(part, add_special_tokens=False).ids
            again = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
            lines = (again.count("\n"), part.count("\n"))
            if again.split() != part.split() or lines[0] != lines[1]:
                problems.append(f"the text {part!r} of the template reads back as {again!r}")
        return list(dict.fromkeys(problems))


# v0 learns "###" at the start of every turn, which ends the turn before it, the names of the
# assistant, and "### " at the end: so the released code masks its labels.
_V0 = ChatTemplate(
    system="{system}\n\n",
    message=_SYSTEM_V0,
    opening="###",
    user=" Human: {text}\n",
    mark="### Assistant:",
    answer=" {text}",
    stop="\n###",
    end=" ",
    learns_marks=True,
)
_V1 = ChatTemplate(
    system="{system} ",
    message=_SYSTEM_V1,
    user="USER: {text} ",
    mark="ASSISTANT:",
    answer=" {text}",
    stop="</s>",
    tokens=("</s>",),
)
_LLAMA3 = ChatTemplate(
    start="<|begin_of_text|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
    mark="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer="{text}",
    stop="<|eot_id|>",
    tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
_CHATML = ChatTemplate(
    system="<|im_start|>system\n{system}<|im_end|>\n",
    message="You are a helpful assistant.",
    user="<|im_start|>user\n{text}<|im_end|>\n",
    mark="<|im_start|>assistant\n",
    answer="{text}",
    stop="<|im_end|>",
    between="\n",
    tokens=("<|im_start|>", "<|im_end|>"),
    start="",
)
_MISTRAL = ChatTemplate(
    system="{system}\n\n",
    user="[INST] {system}{text} [/INST]",
    mark="",
    answer=" {text}",
    stop="</s>",
    tokens=("</s>",),
)

CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    "v0": _V0,
    "v1": _V1,
    "plain": ChatTemplate(user="{images}", mark="", answer="{text}", stop="\n", system=""),
    "llama3": _LLAMA3,
    "chatml": _CHATML,
    "mistral": _MISTRAL,
    # From version 0.3 on, Mistral's marks are control tokens.
    "mistral_v3": dataclasses.replace(
        _MISTRAL,
        user="[INST] {system}{text}[/INST]",
        tokens=("</s>", "[INST]", "[/INST]"),
        legacy=False,
    ),
}


def get_chat_template(name: str, tokenizer: "Tokenizer") -> ChatTemplate:
    """Returns the template of that name, which must fit the tokenizer.

    Raises:
        ValueError: there is no such template, or it does not fit; the message lists those that do.
    """
    template = lookup.find(CHAT_TEMPLATES, name, "chat template")
    if problems := template.problems(tokenizer):
        fitting = [key for key, row in CHAT_TEMPLATES.items() if not row.problems(tokenizer)]
        raise ValueError(
            f"the chat template {name!r} is of another tokenizer than "
            f"{tokenizer.name_or_path or 'this one'}: {'; '.join(problems)}. Those that fit it: "
            f"{', '.join(fitting) or 'none'}"
        )
    return template
