"""Answers of the engine are those of one question alone, whatever happens in other slots."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest

import jax_instructblip
from jax_instructblip.inference.batching import Question
from jax_instructblip.inference.engine import Engine, prepare
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from tests.helpers.compile_counter import count_compiles
from tests.helpers.tiny import write_base

NEW = 24  # most tokens of an answer
WORDS = "what color is it which image this number one two three four red green blue".split()
SETTINGS = (
    {},
    {"temperature": 1.5},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
    {"repetition_penalty": 1.4, "min_new_tokens": 3},
    {"do_sample": True, "length_rule": "transformers5", "repetition_penalty": 1.2},
)


class Asked(NamedTuple):
    """A question and its settings."""

    question: Question
    config: GenerationConfig


@pytest.fixture(scope="module", params=["llama", "t5", "llava"])
def blip(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / request.param
    blip = jax_instructblip.load(write_base(folder, request.param))
    blip.silent = True
    if request.param != "t5":  # whose answers end with eos alone
        blip.stop_table = two_tokens(blip)
    return blip


def two_tokens(blip: InstructBlipPipeline) -> np.ndarray:
    """A table that ends an answer with eos, or an odd id behind one that 4 divides."""
    ids = np.arange(blip.variant.llm.vocab)
    table = np.tile((ids % 4 == 0).astype(np.int8), (2, 1))
    table[1, ids % 2 == 1] = 2
    table[:, blip.variant.llm.eos_id] = 2
    return table


def draw(blip, count: int, words: int, seed: int = 0, kinds=SETTINGS) -> list[Asked]:
    """Questions of up to so many words, with random images, limits, and settings among `kinds`."""
    rng, side = np.random.default_rng(seed), blip.variant.vision.image_size
    asked = []
    for number in range(count):
        settings = kinds[rng.integers(len(kinds))]
        limit = int(rng.integers(settings.get("min_new_tokens", 1), NEW + 1))
        text = " ".join(rng.choice(WORDS, rng.integers(1, words + 1)))
        image = rng.integers(0, 256, (1, side, side, 3), np.uint8)
        config = GenerationConfig(max_new_tokens=limit, seed=number, **settings)
        asked.append(Asked(Question(image, text), config))
    return asked


def prepared(blip, asked):
    return [prepare(blip.text, *each) for each in asked]


def alone(blip, asked: Asked):
    """Tokens and log-probabilities of the answer to this question alone.

    It is cut at the limit: a limit changes no earlier token, but would compile another program.
    """
    config = dataclasses.replace(asked.config, max_new_tokens=NEW)
    answer = blip.generate([asked.question.frames[0]], [asked.question.prompt], config)[0]
    limit = asked.config.max_new_tokens
    return answer.tokens[:limit], answer.logprobs[:limit]


def make_engine(blip, requests, slots=4, **sizes) -> Engine:
    width = max(request.batch["tokens"].shape[1] for request in requests)
    return Engine(blip, slots=slots, **{"width": width, "max_new_tokens": NEW, **sizes})


def check_same(blip, asked, handles, dropped=()):
    lengths = set()
    for number, (each, handle) in enumerate(zip(asked, handles, strict=True)):
        if number in dropped and handle.cancelled():
            continue
        tokens, logprobs = alone(blip, each)
        assert handle.result(0).tokens == handle.tokens == tokens, number
        np.testing.assert_allclose(handle.result(0).logprobs, logprobs, rtol=1e-4, atol=1e-4)
        lengths.add(len(tokens) < each.config.max_new_tokens)
    assert lengths == {False, True}  # some answers end by themselves, others at their limit


def run_with_cancellations(engine, requests, seed, part):
    """Submits requests a few at a time, and cancels about this part; returns handles and steps."""
    rng, handles, left, dropped = np.random.default_rng(seed), [], list(requests), set()
    while left or not all(handle.done() for handle in handles):
        for _ in range(min(len(left), int(rng.integers(0, 7)))):
            handles.append(engine.submit(left.pop(0)))
        open_ones = [n for n, handle in enumerate(handles) if not handle.done()]
        for number in open_ones:
            if rng.random() < part:
                engine.cancel(handles[number])
                dropped.add(number)
        ended = engine.step()
        assert all(handle.done() and not handle.cancelled() for handle in ended)
    return handles, dropped


GREEDY = tuple(each for each in SETTINGS if not GenerationConfig.of(**each).sample)


def test_each_answer_is_that_of_its_question_alone(blip):
    """One kind of model samples, too: sampling reads logits alone, and compiles for seconds."""
    samples = blip.variant.kind == "llava"
    asked = draw(blip, 30, words=5, kinds=SETTINGS if samples else GREEDY)
    requests = prepared(blip, asked)
    engine = make_engine(blip, requests)
    if samples:
        engine.warm_up(requests[:1])
    with count_compiles() as compiled:
        handles, dropped = run_with_cancellations(engine, requests, seed=0, part=0.03)
    assert len(compiled) == 0 or not samples
    assert 0 < len(dropped) < 10
    check_same(blip, asked, handles, dropped)


@pytest.mark.full
def test_five_hundred_answers_are_those_of_their_questions_alone(blip):
    asked = draw(blip, 500, words=40, seed=1)
    requests = prepared(blip, asked)
    assert len({request.batch["tokens"].shape for request in requests}) > 1
    engine = make_engine(blip, requests, slots=7, steps=5)
    engine.warm_up(requests)
    with count_compiles() as compiled:
        handles, dropped = run_with_cancellations(engine, requests, seed=1, part=0.03)
    assert len(compiled) == 0
    assert len(dropped) > 50
    check_same(blip, asked, handles, dropped)
