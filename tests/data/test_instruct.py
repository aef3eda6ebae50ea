"""Prompt and answer of one sample: which answer, in which template."""

import collections

import numpy as np
import pytest

from jax_instructblip.data import templates
from jax_instructblip.data.mixture import instruct
from jax_instructblip.data.records import Record
from tests.data.test_mixture import RED


def test_answers_are_drawn_evenly_from_the_distinct_ones():
    record = Record("a", (RED,), "what?", ("red", "red", "red", "pink"))
    drawn = collections.Counter(
        instruct(record, "", np.random.default_rng(seed))[1] for seed in range(400)
    )
    assert set(drawn) == {"red", "pink"}
    assert 160 < drawn["pink"] < 240


def test_templates_dress_the_prompt():
    record = Record("a", (RED,), "what is it?", ("red",), choices=("red", "blue"))
    found = {kind: set() for kind in ("question", "choice", "caption", "question_generation", "")}
    for kind, seen in found.items():
        for seed in range(200):
            seen.add(instruct(record, kind, np.random.default_rng(seed)))
    assert found[""] == {("what is it?", "red")}
    assert ("Question: what is it? Short answer:", "red") in found["question"]
    assert len(found["question"]) == 10
    assert ("A photo of", "red") in found["caption"]
    assert any("Options: (a) red (b) blue" in prompt for prompt, _ in found["choice"])
    prompts = {prompt for prompt, _ in found["question_generation"]}
    assert {answer for _, answer in found["question_generation"]} == {"what is it?"}
    assert all("red" in prompt for prompt in prompts)


def test_a_caption_is_split_from_its_first_word_to_its_middle():
    caption = "a red thing on green grass near"  # seven words
    record = Record("a", (RED,), "", (caption,))
    seen = collections.Counter()
    for seed in range(300):
        prompt, answer = instruct(record, "caption_prefix", np.random.default_rng(seed))
        assert f"{prompt} {answer}" == caption
        seen[len(prompt.split())] += 1
    assert set(seen) == {1, 2, 3} and min(seen.values()) > 60
    rng = np.random.default_rng(0)
    assert instruct(Record("b", (RED,), "", ("red",)), "caption_prefix", rng) == ("", "red")
    pair = Record("c", (RED,), "", ("red  grass",))
    assert instruct(pair, "caption_prefix", rng) == ("red", "grass")


@pytest.mark.parametrize("kind", templates.CAPTIONS)
def test_a_caption_of_which_a_style_leaves_nothing_is_not_trained_on(kind):
    record = Record("a", (RED,), "", ("!!!",))
    with pytest.raises(ValueError, match=r"of its caption .!!!. the style lavis leaves nothing"):
        instruct(record, kind, np.random.default_rng(0), style=templates.TextStyle("lavis"))


STYLE, PLAIN = templates.TextStyle("lavis", "q_a"), templates.PAPER


@pytest.mark.parametrize(
    ("kind", "prompt", "answer"),
    [
        ("question", "what is it, on the stop sign?", "A Dog (Brown)!"),
        ("caption", None, "a dog brown"),
        ("blip2_caption", "a photo of", "a dog brown"),
        ("blip2_question", "Question: what is it, on the stop sign? Answer:", "A Dog (Brown)!"),
        ("question_generation", "A Dog (Brown)!", "what is it, on the stop sign?"),
        ("", 'What is it, on the "STOP" sign?', "A Dog (Brown)!"),
    ],
)
def test_texts_are_written_as_the_released_code_does_where_told(kind, prompt, answer):
    record = Record("a", (b"x",), 'What is it, on the "STOP" sign?', ("A Dog (Brown)!",))
    found = instruct(record, kind, np.random.default_rng(0), None, STYLE)
    assert found[1] == answer and (prompt is None or prompt in found[0])
    plain = instruct(record, kind, np.random.default_rng(0))
    turned = kind == "question_generation"
    assert plain[1] == (record.prompt if turned else "A Dog (Brown)!")


def test_a_dialogue_is_written_as_rounds_one_after_the_other_or_marked():
    record = Record("a", (b"x",), "And now?", ("No",), history=(("Who?", "I."), ("Why?", "So.")))
    template = "Dialog history: {history} Question: {question}"
    found = [templates.format_prompt(template, record, "", style) for style in (PLAIN, STYLE)]
    assert found == [
        "Dialog history: Who? I. Why? So. Question: And now?",
        "Dialog history: q: Who? a: I. q: Why? a: So. Question: and now?",
    ]


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="processor is 'blip', expected one of paper, lavis"):
        templates.TextStyle("blip")
    with pytest.raises(ValueError, match="dialogue is 'Q', expected one of plain, q_a"):
        templates.TextStyle(dialogue="Q")
