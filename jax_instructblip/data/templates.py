"""Instruction templates, as data: the sentences that turn a question into a prompt.

Those of captioning, question answering and question generation are InstructBLIP's (arXiv
2305.06500, appendix C), in the paper's order and spelling; a placeholder is filled by `render`.
Which template a sample gets is a function of the caller's random number, never of a global state.
"""

import dataclasses
import string

from jax_instructblip.data.records import Record
from jax_instructblip.data.text_processors import PROCESSORS, process_caption, process_question

OCR_TOKENS = 30  # of those read in the image, how many stand in a prompt (as the released code)

CAPTION = (
    "A short image caption:",
    "A short image description:",
    "A photo of",
    "An image that shows",
    "Write a short description for the image.",
    "Write a description for the photo.",
    "Provide a description of what is presented in the photo.",
    "Briefly describe the content of the image.",
    "Can you briefly explain what you see in the image?",
    "Could you use a few words to describe what you perceive in the photo?",
    "Please provide a short depiction of the picture.",
    "Using language, provide a short account of the image.",
    "Use a few words to illustrate what is happening in the picture.",
)
QUESTION = (
    "{question}",
    "Question: {question}",
    "{question} A short answer to the question is",
    "Q: {question} A:",
    "Question: {question} Short answer:",
    "Given the image, answer the following question with no more than three words. {question}",
    "Based on the image, respond to this question with a short answer: {question}. Answer:",
    "Use the provided image to answer the question: {question} "
    "Provide your answer as short as possible:",
    'What is the answer to the following question? "{question}"',
    'The question "{question}" can be answered using the image. A short answer is',
)
QUESTION_GENERATION = (
    "Given the image, generate a question whose answer is: {answer}. Question:",
    "Based on the image, provide a question with the answer: {answer}. Question:",
    'Given the visual representation, create a question for which the answer is "{answer}".',
    "From the image provided, craft a question that leads to the reply: {answer}. Question:",
    "Considering the picture, come up with a question where the answer is: {answer}.",
    # "an question" is the paper's spelling.
    "Taking the image into account, generate an question that has the answer: {answer}. Question:",
)
# Options are rendered "(a) blue (b) yellow (c) pink", as the released evaluation prompts have them.
CHOICE = (
    "Question: {question} Options: {options}. Short answer:",
    "Question: {question} Options: {options}. Answer:",
    "{question} Options: {options}.",
    "Q: {question} Options: {options}. A:",
)
# Ours: what the frozen towers of the embedded default were captioned with.
DETAIL = (
    "Describe the image in detail:",
    "A detailed image description:",
    "List everything in the image:",
    "A long image caption:",
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "caption": CAPTION,
    "detail": DETAIL,
    "question": QUESTION,
    "question_generation": QUESTION_GENERATION,
    "choice": CHOICE,
}


DIALOGUES = ("plain", "q_a")


@dataclasses.dataclass(frozen=True)
class TextStyle:
    """The way in which the texts of records are written, where paper and released code differ.

    Attributes:
      processor: "paper" leaves questions and captions as they are; "lavis" puts them in lower case
        without marks (`text_processors.py`).
      dialogue: "plain" writes earlier rounds one after the other; "q_a" as `q: ... a: ...`.
    """

    processor: str = "paper"
    dialogue: str = "plain"

    def __post_init__(self):
        for name, known in (("processor", PROCESSORS), ("dialogue", DIALOGUES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )

    def question(self, text: str) -> str:
        """The question of a prompt, or one that is to be generated."""
        return process_question(text) if self.processor == "lavis" else text

    def caption(self, text: str) -> str:
        """The caption that is to be generated."""
        return process_caption(text) if self.processor == "lavis" else text

    def history(self, rounds: tuple[tuple[str, str], ...]) -> str:
        """The earlier rounds of a dialogue on one line."""
        marks = ("q: ", "a: ") if self.dialogue == "q_a" else ("", "")
        return " ".join(
            mark + text for each in rounds for mark, text in zip(marks, each, strict=True)
        )


PAPER = TextStyle()


def render_options(choices: tuple[str, ...]) -> str:
    """The choices on one line: `(a) blue (b) yellow (c) pink`.

    Raises:
        ValueError: there are none, or more than the letters a to z.
    """
    if not 1 <= len(choices) <= len(string.ascii_lowercase):
        raise ValueError(f"{len(choices)} choices, expected 1 to {len(string.ascii_lowercase)}")
    letters = string.ascii_lowercase
    return " ".join(
        f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=False)
    )


def render(template: str, **fields: str) -> str:
    """The template with its placeholders filled.

    Raises:
        ValueError: a placeholder has no field, or a field no placeholder; both are named.
    """
    wanted = placeholders(template)
    if wanted != set(fields):
        raise ValueError(
            f"template {template!r} has the placeholders {sorted(wanted)}, "
            f"but was given {sorted(fields)}"
        )
    return template.format(**fields)


def placeholders(template: str) -> set[str]:
    """The names in braces."""
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def format_prompt(template: str, record: Record, answer: str = "", style: TextStyle = PAPER) -> str:
    """The prompt of a record: the template, filled with what the record holds.

    Placeholders: `{question}` the record's prompt, `{answer}`, `{options}`, `{context}`, `{ocr}`,
    `{history}`. Words read in the image and earlier rounds of a dialogue stand in front of a
    template that does not place them.

    Raises:
        ValueError: the template has another placeholder, or wants options of a record without.
    """
    named = placeholders(template)
    fields = {
        "question": style.question(record.prompt),
        "answer": answer,
        "context": record.context,
        "ocr": ", ".join(record.ocr[:OCR_TOKENS]),
        "history": style.history(record.history),
    }
    if "options" in named:
        fields["options"] = render_options(record.choices)
    prompt = render(template, **{name: fields[name] for name in named & fields.keys()})
    if record.history and "history" not in named:
        prompt = f"{fields['history']} {prompt}"
    if record.ocr and "ocr" not in named:
        prompt = f"OCR tokens: {fields['ocr']}. {prompt}"
    return prompt
