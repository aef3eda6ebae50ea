"""Instruction templates, as data: the sentences that turn a question into a prompt.

The templates of captioning, question answering and question generation are InstructBLIP's (arXiv
2305.06500, appendix C), those of brief captions LLaVA's (arXiv 2304.08485, table 11), in the
papers' order and spelling. `format_prompt` fills their placeholders from a record; `mixture.py`
draws the template of each sample.
"""

import dataclasses
import string

from jax_instructblip.data.records import Record
from jax_instructblip.data.text_processors import PROCESSORS, process_caption, process_question

OCR_TOKENS = 30  # most OCR words in a prompt, as in LAVIS

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
# Not of the paper: the prompts of long captions of the built-in dataset `shapes`.
DETAIL = (
    "Describe the image in detail:",
    "A detailed image description:",
    "List everything in the image:",
    "A long image caption:",
)

BRIEF = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)

# BLIP-2's fine-tunings have one prompt each (arXiv 2301.12597).
BLIP2_CAPTION = ("a photo of",)
BARE_CAPTION = ("",)  # before fine-tuning: a caption is written to no prompt
BLIP2_QUESTION = ("Question: {question} Answer:",)
# ScienceQA's, as the evaluation asks it: the hint belongs to the question.
CHOICE_WITH_CONTEXT = ("Context: {context} Question: {question} Options: {options}. Answer:",)

PLACEHOLDERS = ("question", "answer", "options", "context", "ocr", "history")

# The name of a rule instead of a list: the caption's beginning is the prompt, its rest the answer.
CAPTION_PREFIX = "caption_prefix"
# The answer is a caption.
CAPTIONS = ("caption", "blip2_caption", "bare_caption", "brief", CAPTION_PREFIX)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "caption": CAPTION,
    "detail": DETAIL,
    "brief": BRIEF,
    "question": QUESTION,
    "question_generation": QUESTION_GENERATION,
    "choice": CHOICE,
    "choice_with_context": CHOICE_WITH_CONTEXT,
    "blip2_caption": BLIP2_CAPTION,
    "bare_caption": BARE_CAPTION,
    "blip2_question": BLIP2_QUESTION,
}


DIALOGUES = ("plain", "q_a")


@dataclasses.dataclass(frozen=True)
class TextStyle:
    """The writing of records' texts, in the points where paper and released code differ.

    Attributes:
      processor: "paper" leaves questions and captions as they are; "lavis" writes them in lower
        case without punctuation (`text_processors.py`).
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
        """Returns a question as the style writes it, asked in a prompt or to be generated."""
        return process_question(text) if self.processor == "lavis" else text

    def caption(self, text: str) -> str:
        """Returns a caption that is to be generated, as the style writes it."""
        return process_caption(text) if self.processor == "lavis" else text

    def training_caption(self, text: str) -> str:
        """Returns a caption as the style writes it; raises a ValueError if nothing is left."""
        caption = self.caption(text)
        if not caption.strip():
            raise ValueError(
                f"of its caption {text!r:.60} the style {self.processor} leaves nothing"
            )
        return caption

    def history(self, rounds: tuple[tuple[str, str], ...]) -> str:
        """Returns the earlier rounds (question, answer) of a dialogue as one line of text."""
        marks = ("q: ", "a: ") if self.dialogue == "q_a" else ("", "")
        return " ".join(
            mark + text for each in rounds for mark, text in zip(marks, each, strict=True)
        )


PAPER = TextStyle()


def render_options(choices: tuple[str, ...]) -> str:
    """Returns the choices on one line: `(a) blue (b) yellow (c) pink`.

    Raises:
        ValueError: there are no choices, or more than the letters a to z.
    """
    if not 1 <= len(choices) <= len(string.ascii_lowercase):
        raise ValueError(f"{len(choices)} choices, expected 1 to {len(string.ascii_lowercase)}")
    letters = string.ascii_lowercase
    return " ".join(
        f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=False)
    )


def render(template: str, **fields: str) -> str:
    """Returns the template with its placeholders filled by the fields of the same names.

    Raises:
        ValueError: a placeholder has no field, or a field no placeholder; the message names all.
    """
    wanted = placeholders(template)
    if wanted != set(fields):
        raise ValueError(
            f"template {template!r} has the placeholders {sorted(wanted)}, "
            f"but was given {sorted(fields)}"
        )
    return template.format(**fields)


def placeholders(template: str) -> set[str]:
    """Returns the names in braces, such as `question` of "Q: {question} A:"."""
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def needs_prompts(kind: str) -> bool:
    """Tells whether samples made with `kind` contain the prompts of the records.

    `kind` is a key of `TEMPLATES`, `CAPTION_PREFIX`, or "" for prompts that are used as they are.
    """
    if kind in ("", "question_generation"):  # taken as they are, or asked for
        return True
    return any("question" in placeholders(each) for each in TEMPLATES.get(kind, ()))


def format_prompt(template: str, record: Record, answer: str = "", style: TextStyle = PAPER) -> str:
    """Returns the prompt of a record: the template, filled with the record's texts.

    Placeholders: `{question}` is the record's prompt, `{answer}` the argument `answer`, `{options}`
    the choices, `{context}`, `{ocr}` and `{history}` the fields of those names. If the record has
    OCR words or a history but the template has no placeholder for them, they are put in front.

    Raises:
        ValueError: the template has an unknown placeholder, or `{options}` for a record without
            choices.
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
