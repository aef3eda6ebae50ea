"""Prompt and answer of one sample: which answer, in which template."""

import collections

import numpy as np

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
