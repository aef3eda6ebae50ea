"""Prompts that become conversations, and the ends of their answers."""

import copy
import dataclasses

import numpy as np
import pytest

from jax_instructblip.data.chat_text import ChatTextProcessor, load_text_processor, prompt_problem
from jax_instructblip.data.conversation import Conversation, Turn
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.records import RecordError
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import read_source
from jax_instructblip.models.variants import ProjectorConfig, Variant
from tests.helpers.chat_tokenizers import CONTROL, chat_tokenizer
from tests.helpers.tiny import LANGUAGE, tiny_variant, write_base

SYSTEM = "Be brief."


def chat(kind, template, **form):
    """The processor of a tiny LLaVA with a tokenizer of that kind."""
    tokenizer = copy.deepcopy(chat_tokenizer(kind))
    tokenizer.pad_token = CONTROL[kind][1]
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    llm = dataclasses.replace(LANGUAGE["llama"], vocab=len(tokenizer) + 2, **ids)
    vision = tiny_variant("llama").vision
    variant = Variant("llava", vision, ProjectorConfig(vision.width, llm.width), llm)
    form = InputFormat(template, SYSTEM, **form)
    return ChatTextProcessor(variant, tokenizer, None, input_format=form)


@pytest.fixture(scope="module")
def llama3():
    return chat("llama3", "llama3")


def written(text, example):
    """The text of an example, with its images."""
    ids, at = example["tokens"].tolist(), example["image_at"].tolist()
    parts, start = [], 0
    for index in at:
        parts += [text.llm.decode(ids[start:index]), "<image>"]
        start = index
    return "".join([*parts, text.llm.decode(ids[start:])])


def asked(question):
    begin, end = "<|start_header_id|>", "<|end_header_id|>\n\n"
    return (
        f"<|begin_of_text|>{begin}system{end}{SYSTEM}<|eot_id|>{begin}user{end}{question}<|eot_id|>"
        f"{begin}assistant{end}"
    )


@pytest.mark.parametrize(
    ("prompt", "images", "question"),
    [
        ("What?", 1, "<image>\nWhat?"),
        ("What?", 2, "<image>\n<image>\nWhat?"),
        ("What?", 0, "What?"),
        ("", 1, "<image>"),
        ("Is <image> left of <image>?", 2, "Is <image> left of <image>?"),
        ("What is it?\n<image>", 1, "What is it?\n<image>"),
    ],
)
def test_images_stand_before_the_question_or_where_it_says(llama3, prompt, images, question):
    example = llama3.prompt(prompt, images)
    assert written(llama3, example) == asked(question)
    assert set(example) == {"tokens", "image_at", "truncated"}


def test_a_conversation_is_a_prompt(llama3):
    turns = [("user", "What?"), ("assistant", "A cat."), ("user", "Sure?")]
    example = llama3.prompt(turns, 1)
    assert written(llama3, example) == asked(
        "<image>\nWhat?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?"
    )
    same = llama3.prompt(Conversation("c", tuple(Turn(*turn) for turn in turns)), 1)
    np.testing.assert_array_equal(same["tokens"], example["tokens"])
    silent = llama3.prompt(Conversation("c", (Turn("user", "What?"),), system=""), 0)
    assert SYSTEM not in written(llama3, silent)


@pytest.mark.parametrize(
    ("prompt", "images", "said"),
    [
        ("What is <image>?", 0, "it has 1 <image> in its questions, but 0 images"),
        ("What is <image>?", 2, "it has 2 images, but 1 <image> in its questions: each image"),
        ("<image> and <image>", 1, "it has 2 <image> in its questions, but 1 images"),
        ("", 0, "turn 1: the text of the user is empty"),
        ([("user", "a"), ("assistant", "b")], 1, "the last of which is an answer"),
        ([("assistant", "a"), ("user", "b")], 0, "turn 1: the speaker is 'assistant', but the us"),
        ([("user", "a"), ("assistant", "<image>"), ("user", "b")], 0, "turn 2: an answer has an"),
    ],
)
def test_what_cannot_be_asked_is_named(llama3, prompt, images, said):
    with pytest.raises(RecordError) as caught:
        llama3.prompt(prompt, images)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_what_is_no_prompt():
    for prompt in ("a", Conversation("c", ()), [("user", "a")], (Turn("user", "a"),)):
        assert prompt_problem(prompt) == ""
    for prompt in (3, None, [], ["user", "a"], [("user", 3)], ("user", "a", "b")):
        assert "expected a text, a Conversation or a list of its turns" in prompt_problem(prompt)
    assert "half of a surrogate pair" in prompt_problem("\ud800")


def test_turns_of_a_conversation_may_be_pairs_and_are_checked(llama3):
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    for given in (tuple(map(tuple, turns)), list(map(list, turns))):
        assert prompt_problem(Conversation("c", given)) == ""
        same = llama3.prompt(Conversation("c", given), 1)
        np.testing.assert_array_equal(same["tokens"], llama3.prompt(turns, 1)["tokens"])
    for wrong in (("hi",), (Turn("user", 5),), (("user", "a", "b"),), 5):
        assert "a list of its turns" in prompt_problem(Conversation("c", wrong))
    system = lambda system: prompt_problem(Conversation("c", turns, system=system))
    assert system("Be kind.") == system("") == ""
    assert system(5) == "has the system message 5, expected a text or None"
    assert "a system message that cannot be written as UTF-8" in system("\ud800")


KINDS = {
    "v0": "qwen",
    "plain": "llama3",
    "llama3": "llama3",
    "chatml": "qwen",
    "mistral_v3": "mistral_v3",
}


def test_an_answer_that_begins_with_its_stop_is_empty():
    text = chat(KINDS["plain"], "plain")
    line_end = text.llm.encode("\n", add_special_tokens=False)
    assert text.decode([*line_end, *text.candidate("A cat")]) == ""
    assert text.decode([*text.candidate("A cat"), *line_end, *text.candidate("red")]) == "A cat"


@pytest.mark.parametrize("template", KINDS)
def test_a_candidate_is_what_an_answer_is_in_training(template):
    text = chat(KINDS[template], template)
    for answer in ("A cat", "red", "12, 3"):  # a mark at the end would join the stop "\\n"
        talk = Conversation("c", (Turn("user", "<image>"), Turn("assistant", answer)), 1)
        example = text.chat.example(talk)
        prompt = text.prompt("", 1)["tokens"]
        ids = text.candidate(answer).tolist()
        assert example["tokens"][: len(prompt)].tolist() == prompt.tolist()
        behind = example["tokens"][len(prompt) :].tolist()
        assert behind[: len(ids)] == ids and len(behind) > len(ids)
        assert text.decode(ids) == text.decode(behind) == answer
    with pytest.raises(ValueError, match="the answer '<image>' has an <image>"):
        text.candidate("<image>")


@pytest.mark.parametrize(
    ("template", "ids", "word"),
    [
        ("v0", ("<|im_start|>",), "###"),
        ("plain", ("<|end_of_text|>",), "\n"),
        ("llama3", ("<|end_of_text|>", "<|eot_id|>"), ""),
        ("chatml", ("<|im_start|>", "<|im_end|>"), ""),
        ("mistral_v3", ("</s>",), ""),
    ],
)
def test_an_answer_ends_with_eos_or_the_stop(template, ids, word):
    text = chat(KINDS[template], template)  # the eos of these tokenizers is their second token
    assert text.stop_text == word
    assert text.stop_ids == set(text.llm.convert_tokens_to_ids(list(ids)))
    table = text.stop_table()
    if template == "mistral_v3":
        assert table is None  # eos is all, as in every other model
        return
    size = max(len(word), 1)
    assert table is not None and table.shape == (size, text.variant.llm.vocab)
    assert all((table[:, i] == size).all() for i in text.stop_ids)


def follow(table, ids):
    """The number of tokens up to the end by the table; None if there is none."""
    state = 0
    for count, i in enumerate(ids, start=1):
        state = table[state, i]
        if state == len(table):
            return count
    return None


SPELT = ["no end", "a#b##c", "a###", "a ### Human", "# ## ###", "####", "a\n###b", "##", "é###", ""]


def test_a_stop_is_found_however_it_is_spelt():
    """Every way to cut the text into pieces that the tokenizer has leads to the same end."""
    text = chat("qwen", "v0")
    table = text.stop_table()
    backend, rng = text.llm.backend_tokenizer, np.random.default_rng(0)
    assert table is not None
    for words in SPELT:
        for _ in range(5):
            cuts = np.sort(rng.integers(0, len(words) + 1, 3))
            parts = [words[a:b] for a, b in zip([0, *cuts], [*cuts, len(words)], strict=True)]
            ids = [i for part in parts for i in backend.encode(part, add_special_tokens=False).ids]
            end = follow(table, ids)
            assert (end is not None) == ("###" in words), (words, ids)
            if end is not None:  # no earlier and no later than the text has it
                assert "###" in backend.decode(ids[:end]) and "###" not in backend.decode(
                    ids[: end - 1]
                )
            assert text.decode(ids) == words.partition("###")[0].strip()


def test_a_stop_in_sentencepiece(tmp_path):
    folder = write_base(tmp_path / "base", "llama")
    plain = TextProcessor.load(folder, tiny_variant("llama", **sizes(folder)))
    fields = dataclasses.replace(plain, input_format=InputFormat("v1"))
    text = ChatTextProcessor.of(fields)
    assert text.stop_table() is None and text.stop_ids == {text.variant.llm.eos_id}
    text.__dict__["stop_text"] = "#red"  # as if it were a template's
    table = text.stop_table()
    assert table is not None
    pieces = {p: i for p, i in text.llm.get_vocab().items() if p in ("#", "▁", "r", "e", "d", "##")}
    ids = lambda letters: [pieces[letter] for letter in letters]
    assert follow(table, [*ids("##red")]) == 5 and follow(table, ids("#r▁ed")) is None
    assert follow(table, [*ids("#r"), 0, *ids("ed")]) == 5  # a token without a text
    assert text.llm.eos_token_id == 2 and follow(table, [*ids("#"), 2]) == 2


def sizes(folder):
    llm = read_source(folder).variant
    return {
        "llm.vocab": llm.llm.vocab,
        "llm.pad_id": llm.llm.pad_id,
        "qformer.vocab": llm.qformer.vocab,
    }


def test_marks_and_limit_are_those_of_the_format():
    form = InputFormat("v0", image_marks=("<|im_start|>", "<|im_end|>"))
    text = dataclasses.replace(chat("qwen", "v0"), input_format=form)
    example = text.prompt("What?", 1)
    at = int(example["image_at"][0])
    around = text.llm.convert_ids_to_tokens(example["tokens"][at - 1 : at + 1].tolist())
    assert around == ["<|im_start|>", "<|im_end|>"]
    assert text.with_limit(7).chat.limit == 7 and text.chat.limit == form.limit


def test_a_template_of_another_tokenizer_or_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'chatml' is of another tokenizer .* fit it: .*llama3"):
        chat("llama3", "chatml")
    folder = write_base(tmp_path / "t5", "t5")
    variant = read_source(folder).variant
    with pytest.raises(ValueError, match="'v1' needs a decoder-only language model, t5 is an enc"):
        load_text_processor(folder, variant, InputFormat("v1"))
    assert type(load_text_processor(folder, variant, InputFormat())) is TextProcessor
