"""Chat templates fit the tokenizers that have their control tokens, and are refused by others."""

import pytest

from jax_instructblip.data.chat_templates import CHAT_TEMPLATES, get_chat_template
from jax_instructblip.data.tokenizer_files import load_qformer_tokenizer
from tests.helpers.chat_tokenizers import CONTROL, chat_tokenizer


@pytest.mark.parametrize(
    ("template", "kind", "reason"),
    [
        ("v1", "llama3", r"it has no control token '</s>'\. .*: v0, plain, llama3$"),
        ("chatml", "llama3", "it has no control token '<|im_start|>'; it has no control token"),
        ("llama3", "qwen", "it has no control token '<|begin_of_text|>'"),
        ("mistral", "mistral_v3", r"'\[INST\]' is a control token of it, but ordinary text"),
    ],
)
def test_a_template_of_another_tokenizer_is_refused(template, kind, reason):
    message = f"the chat template {template!r} is of another tokenizer than this one: "
    with pytest.raises(ValueError, match=reason.replace("|", r"\|")) as error:
        get_chat_template(template, chat_tokenizer(kind))
    assert str(error.value).startswith(message)


def test_a_template_whose_texts_a_tokenizer_cannot_write_is_refused(shared):
    bert = load_qformer_tokenizer(shared / "data" / "tokenizers" / "bert-base-uncased")
    problems = CHAT_TEMPLATES["plain"].problems(bert)
    assert problems == ["the text '\\n' of the template reads back as ''"]
    problems = CHAT_TEMPLATES["v1"].problems(bert)
    assert "the text 'USER: ' of the template reads back as 'user :'" in problems


def test_an_unknown_template_is_refused_with_a_near_name():
    with pytest.raises(ValueError, match="unknown chat template 'lama3'; did you mean llama3"):
        get_chat_template("lama3", chat_tokenizer("llama3"))


def test_every_template_fits_a_tokenizer_and_can_be_split():
    for kind, templates in {
        "llama3": "v0 plain llama3",
        "qwen": "v0 plain chatml",
        "mistral_v3": "v0 v1 plain mistral_v3",
    }.items():
        fitting = [
            name
            for name, template in CHAT_TEMPLATES.items()
            if not template.problems(chat_tokenizer(kind))
        ]
        assert fitting == templates.split()
    row = CHAT_TEMPLATES["llama3"]
    assert row.split(row.user) == [
        *("<|start_header_id|>", "user", "<|end_header_id|>", "\n\n", "{text}", "<|eot_id|>")
    ]
    assert CONTROL.keys() == {"llama3", "qwen", "mistral_v3"}
