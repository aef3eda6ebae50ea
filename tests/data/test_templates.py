"""Templates: complete, fillable, and strict about their placeholders."""

import pytest

from jax_instructblip.data import templates
from jax_instructblip.data.records import Record

FIELDS = {
    "caption": {},
    "detail": {},
    "question": {"question": "What is this?"},
    "question_generation": {"answer": "two cups"},
    "choice": {"question": "What is this?", "options": "(a) a cup (b) a cat"},
    "choice_with_context": {
        "question": "What is this?",
        "options": "(a) a cup (b) a cat",
        "context": "It purrs.",
    },
    "blip2_caption": {},
    "bare_caption": {},
    "brief": {},
    "blip2_question": {"question": "What is this?"},
}


# The stages of BLIP-2 and fine-tunings ask in one way.
FIXED = (
    templates.BARE_CAPTION,
    templates.BLIP2_CAPTION,
    templates.BLIP2_QUESTION,
    templates.CHOICE_WITH_CONTEXT,
)


def test_the_papers_numbers_of_templates():
    found = [len(group) for group in (templates.CAPTION, templates.QUESTION)]
    assert [*found, len(templates.QUESTION_GENERATION)] == [13, 10, 6]


@pytest.mark.parametrize("kind", sorted(templates.TEMPLATES))
def test_every_template_takes_the_fields_of_its_kind(kind):
    group = templates.TEMPLATES[kind]
    assert len(group) >= 4 or group in FIXED
    assert len(set(group)) == len(group)
    for template in group:
        text = templates.render(template, **FIELDS[kind])
        assert "{" not in text
        assert all(value in text for value in FIELDS[kind].values())


def test_captions_alone_need_no_prompt_of_the_record():
    free = {kind for kind in templates.TEMPLATES if not templates.needs_prompts(kind)}
    assert free == {"caption", "detail", "brief", "blip2_caption", "bare_caption"}
    assert not templates.needs_prompts(templates.CAPTION_PREFIX)
    assert templates.needs_prompts("")  # prompts as they are


def test_options_are_lettered():
    assert templates.render_options(("blue", "yellow", "pink")) == "(a) blue (b) yellow (c) pink"


def test_no_options_and_too_many_are_refused():
    with pytest.raises(ValueError, match="0 choices"):
        templates.render_options(())
    with pytest.raises(ValueError, match="27 choices"):
        templates.render_options(("x",) * 27)


@pytest.mark.parametrize("fields", [{}, {"question": "Q?", "answer": "A"}, {"answer": "A"}])
def test_wrong_fields_are_named(fields):
    with pytest.raises(ValueError, match=r"\['question'\]"):
        templates.render("Question: {question}", **fields)


def test_braces_in_a_question_are_only_text():
    assert templates.render("{question}", question="What is {x}?") == "What is {x}?"


RECORD = Record(
    "a",
    (b"x",),
    "Why?",
    ("so",),
    choices=("yes", "no"),
    context="A hint.",
    ocr=("STOP", "4 {x}"),
    history=(("Who?", "a man"), ("Where?", "here")),
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{history} {ocr} {question}", "Who? a man Where? here STOP, 4 {x} Why?"),
        ("{question}", "OCR tokens: STOP, 4 {x}. Who? a man Where? here Why?"),
        (
            "{history}: OCR tokens: {ocr}. {context} {question} {options} {answer}",
            "Who? a man Where? here: OCR tokens: STOP, 4 {x}. A hint. Why? (a) yes (b) no so",
        ),
    ],
)
def test_a_record_dresses_a_template(template, expected):
    assert templates.format_prompt(template, RECORD, "so") == expected


def test_only_the_first_thirty_words_of_an_image_are_told():
    words = tuple(f"w{index}" for index in range(40))
    prompt = templates.format_prompt("{question}", Record("a", (b"x",), "Why?", (), ocr=words))
    assert prompt == f"OCR tokens: {', '.join(words[:30])}. Why?"


def test_a_template_cannot_ask_for_what_no_record_has():
    with pytest.raises(ValueError, match=r"placeholders \['caption'\]"):
        templates.format_prompt("{caption}", RECORD)
