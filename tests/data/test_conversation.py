"""Conversations in tokens: what is learned, where images stand, what is cut and what is refused."""

import copy
import itertools

import numpy as np
import pytest

from jax_instructblip.data.batch import collate
from jax_instructblip.data.chat_templates import ORDERS
from jax_instructblip.data.conversation import Conversation, ConversationProcessor, Turn
from jax_instructblip.data.records import Record, RecordError
from jax_instructblip.data.spec import IGNORE
from tests.helpers.chat_tokenizers import chat_tokenizer
from tests.helpers.conversations import talk

VISUAL = 4


def processor(template, kind="llama3", **options):
    return ConversationProcessor(chat_tokenizer(kind), template, visual_tokens=VISUAL, **options)


def shown(example, tokenizer):
    """The text of an example: images as <image>, and targets, run by run, in {braces}."""
    parts = []
    runs = itertools.groupby(
        enumerate(example["tokens"].tolist()), lambda each: example["targets"][each[0]] != IGNORE
    )
    at = example["image_at"].tolist()
    for learned, run in runs:
        text = ""
        pending: list[int] = []
        for index, token in run:
            if index in at:
                text += tokenizer.decode(pending) + "<image>" * at.count(index)
                pending = []
            pending.append(token)
        text += tokenizer.decode(pending)
        parts.append(f"{{{text}}}" if learned else text)
    return "".join(parts)


TWO = ("<image>\nWhat?", "A cat.", "Sure?", "Yes.")
WRITTEN = {
    "v0": "SYS\n\n{###} Human: <image>\nWhat?\n{### Assistant: A cat.\n###} Human: Sure?\n"
    "{### Assistant: Yes.\n### }",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{A cat.<|eot_id|>}"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{Yes.<|eot_id|>}",
    "chatml": "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
    "<|im_start|>assistant\n{A cat.<|im_end|>}\n<|im_start|>user\nSure?<|im_end|>\n"
    "<|im_start|>assistant\n{Yes.<|im_end|>}",
    "mistral_v3": "<s>[INST] SYS\n\n<image>\nWhat?[/INST]{ A cat.</s>}"
    "[INST] Sure?[/INST]{ Yes.</s>}",
}
KINDS = {"v0": "qwen", "llama3": "llama3", "chatml": "qwen", "mistral_v3": "mistral_v3"}


@pytest.mark.parametrize("template", WRITTEN)
def test_a_conversation_reads_as_its_template_says(template):
    example = processor(template, KINDS[template]).example(talk(*TWO, system="SYS"))
    assert shown(example, chat_tokenizer(KINDS[template])) == WRITTEN[template]


@pytest.mark.parametrize("template", WRITTEN)
def test_without_a_system_message_its_text_is_left_out(template):
    example = processor(template, KINDS[template]).example(talk(*TWO, system=""))
    written = shown(example, chat_tokenizer(KINDS[template]))
    assert "SYS" not in written and "system" not in written
    assert written.startswith(
        {
            "v0": "### Human: ",  # not learned, for nothing need stand before it
            "llama3": "<|begin_of_text|><|start_header_id|>user",
            "chatml": "<|im_start|>user",
            "mistral_v3": "<s>[INST] <image>",
        }[template]
    )


def refusal(conversation, template="llama3", kind="llama3", answered=True, **options):
    """The reasons for which it is refused."""
    own = processor(template, kind, **options)
    with pytest.raises(RecordError) as error:
        own.encode(conversation, answered=answered)
    assert str(error.value).startswith(f"conversation {conversation.id!r} cannot be used:")
    return error.value.problems


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (talk(images=0), "it has no turns, expected a question and an answer"),
        (
            talk("<image> a", "b", "c"),
            "it has 3 turns, the last of which is a question without an answer",
        ),
        (
            Conversation("c1", (Turn("assistant", "hi"), Turn("assistant", "hi"))),
            "turn 1: the speaker is 'assistant', but the user starts",
        ),
        (
            Conversation("c1", (Turn("user", "a"), Turn("user", "b"))),
            "turn 2: the speaker is 'user', but the assistant takes the next turn",
        ),
        (
            Conversation("c1", (Turn("human", "a"), Turn("assistant", "b"))),
            "turn 1: the speaker is 'human', expected user or assistant",
        ),
        (
            talk("a", "b", images=1),
            "it has 1 images, but 0 <image> in its questions: each image needs one",
        ),
        (
            talk("<image> a <image>", "b", images=1),
            "it has 2 <image> in its questions, but 1 images",
        ),
        (
            talk("<image> a", "b <image>"),
            "turn 2: an answer has an <image>; images stand in questions",
        ),
        (talk("<image> a", " \n"), "turn 2: the text of the assistant is empty"),
        (talk("", "b", images=0), "turn 1: the text of the user is empty"),
        (talk("a", "b\ud800", images=0), "turn 2: the text cannot be written as UTF-8"),
        (
            talk("a", "b", images=0, system="<image>"),
            "the system message has an <image>; images stand in questions",
        ),
    ],
)
def test_a_conversation_that_cannot_be_used_is_named_with_the_reason(conversation, reason):
    (problem,) = refusal(conversation)
    assert problem.startswith(reason)


def test_all_reasons_are_listed():
    assert len(refusal(talk("", "", "<image>", "<image>", images=3))) == 4


def test_a_prompt_ends_with_a_question():
    (problem,) = refusal(talk("<image> a", "b"), answered=False)
    assert problem == "it has 2 turns, the last of which is an answer, expected a question"


def test_plain_reads_an_image_and_its_caption_alone():
    problems = refusal(talk("a", "b", "c", "d", images=0), "plain")
    assert problems == [
        "it has 4 turns, but the template 'plain' reads no questions: expected an image and its "
        "caption",
        "it has no image, but the template 'plain' reads nothing else",
    ]
    example = processor("plain").example(talk("Describe it. <image>", "A cat."))
    assert shown(example, chat_tokenizer("llama3")) == "<|begin_of_text|>{<image>A cat.\n}"


@pytest.mark.parametrize(
    ("texts", "images", "written"),
    [
        (("<image>\na", "b"), 1, "<image>\na"),
        (("a<image>", "b"), 1, "a<image>"),
        (("a <image> or <image><image>?", "b"), 3, "a <image> or <image><image>?"),
        (("a", "b", "<image>c", "d"), 1, "<image>c"),
        (("a", "b"), 0, "a"),
    ],
)
def test_visual_vectors_stand_where_the_images_are_marked(texts, images, written):
    own = processor("chatml", "qwen")
    example = own.example(talk(*texts, images=images))
    assert f"user\n{written}<|im_end|>" in shown(example, own.tokenizer)
    pixels = np.zeros((images, 2, 2, 3), np.uint8)
    batch = collate([example | {"images": pixels}], visual_tokens=VISUAL)
    row = batch["slots"][0]
    assert (row >= 0).sum() == images * VISUAL
    assert len(row) == len(example["tokens"]) + images * VISUAL
    for image, at in enumerate(example["image_at"]):
        first = int(np.flatnonzero(row == image * VISUAL)[0])
        assert first == at + image * VISUAL
        assert batch["tokens"][0, first - 1] == example["tokens"][at - 1] or image
    learned = batch["targets"][0] != IGNORE
    answers = own.tokenizer.decode(batch["targets"][0][learned])
    assert answers == "".join(f"{answer}<|im_end|>" for answer in texts[1::2])


def test_marks_around_images():
    tokenizer = load_tokenizers_with_marks()
    own = ConversationProcessor(
        tokenizer, "llama3", visual_tokens=VISUAL, image_marks=("<im_start>", "<im_end>")
    )
    example = own.example(talk("<image>\na <image>", "b", images=2))
    assert "\n\n<im_start><image><im_end>\na <im_start><image><im_end><|eot_id|>" in shown(
        example, tokenizer
    )
    with pytest.raises(ValueError, match="image_marks has <im_start>, <im_end>, which the token"):
        processor("llama3", image_marks=("<im_start>", "<im_end>"))


def load_tokenizers_with_marks():
    tokenizer = copy.deepcopy(chat_tokenizer("llama3"))
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    return tokenizer


def test_a_long_conversation_loses_its_right_and_tells_of_what():
    conversation = talk("<image>\nWhat?", "A cat.", "Sure?", "Yes.")
    whole = processor("llama3").example(conversation)
    total = len(whole["tokens"]) + VISUAL
    assert not processor("llama3", limit=total).example(conversation)["truncated"].any()
    last_question = int(np.flatnonzero(whole["targets"] == IGNORE)[-1])
    refused = 0
    for limit in range(1, total):
        own = processor("llama3", limit=limit)
        kept = limit - VISUAL
        if not (whole["targets"][: max(kept, 0)] != IGNORE).any():
            refused += 1
            with pytest.raises(ValueError, match="'c1'.*(no target in its first|beyond the limit)"):
                own.example(conversation)
            continue
        example = own.example(conversation)
        np.testing.assert_array_equal(example["tokens"], whole["tokens"][:kept])
        np.testing.assert_array_equal(example["targets"], whole["targets"][:kept])
        np.testing.assert_array_equal(example["truncated"], [0, kept <= last_question, 1])
    assert 10 < refused < total - 5


def test_the_limit_counts_every_image():
    conversation = talk("<image>a<image>", "b" * 50, images=2)
    limit = 40 + 2 * VISUAL
    example = processor("llama3", limit=limit).example(conversation)
    assert len(example["tokens"]) == 40
    with pytest.raises(ValueError, match="image 2 of 2 ends at slot .* beyond the limit of 13 "):
        processor("llama3", limit=13).example(conversation)


def test_an_image_behind_the_last_target_that_fits_is_refused():
    own = processor("llama3")
    room = own.example(talk("<image>" + "a " * 60, "b"))
    conversation = talk("<image>a", "b" * 30, "<image>c", "d", images=2)
    assert len(own.example(conversation)["image_at"]) == 2
    with pytest.raises(ValueError, match="image 2 of 2 ends at slot"):
        own.example(conversation, room)


def test_the_order_of_question_and_images_is_drawn_from_seed_and_step():
    rng = lambda step: np.random.default_rng([3, step])
    conversation = talk("What?\n<image>", "a", "<image> and?", "b", images=2)
    draw = lambda order, step=0: conversation.ordered(order, rng(step)).turns[0].text
    assert draw("written") == "What?\n<image>"
    assert draw("first") == "<image>\nWhat?"
    assert draw("last") == "What?\n<image>"
    drawn = [draw("drawn", step) for step in range(200)]
    assert drawn == [draw("drawn", step) for step in range(200)]
    assert set(drawn) == {draw("first"), draw("last")}
    assert 70 < drawn.count(draw("first")) < 130
    assert conversation.ordered("drawn", rng(0)).turns[1:] == conversation.turns[1:]
    with pytest.raises(ValueError, match=f"order is 'left', expected one of {', '.join(ORDERS)}"):
        draw("left")
    text = talk("What?", "a", images=0)
    assert text.ordered("last", rng(0)) == text


def test_a_record_is_a_conversation():
    record = Record("r", ("a.jpg", "b.jpg"), "Sure?", ("Yes.", "No."), history=(("Q", "A"),))
    conversation = Conversation.from_record(record)
    assert conversation == talk("<image>\n<image>\nQ", "A", "Sure?", "Yes.", images=2, name="r")
    record = Record("r", ("a.jpg",), "Is it <image>?", (), history=(("Q", "A"),))
    assert Conversation.from_record(record) == talk("Q", "A", "Is it <image>?", name="r")
