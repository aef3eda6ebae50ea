"""Answers of the engine are those of one question alone, whatever happens in other slots."""

import asyncio
import dataclasses
import threading
from typing import NamedTuple

import jax
import numpy as np
import pytest

import jax_instructblip
from jax_instructblip.inference import loading
from jax_instructblip.inference.batching import Question
from jax_instructblip.inference.engine import Engine, prepare
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.models.vlm import is_unstacked
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
    samples = blip.variant.llm.kind == "t5"
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
    long = 250 if blip.variant.kind == "llava" else 40  # its template has many tokens, too
    asked = draw(blip, 500, words=long, seed=1)
    requests = prepared(blip, asked)
    assert len({request.batch["tokens"].shape for request in requests}) > 1
    engine = make_engine(blip, requests, slots=7, steps=5)
    engine.warm_up(requests)
    with count_compiles() as compiled:
        handles, dropped = run_with_cancellations(engine, requests, seed=1, part=0.03)
    assert len(compiled) == 0
    assert len(dropped) > 50
    check_same(blip, asked, handles, dropped)


@pytest.mark.full
def test_stacked_layers_answer_alike(blip, monkeypatch):
    """As on TPUs: the caches of all layers are one array, whose first axis is that of layers."""
    monkeypatch.setattr(loading, "UNSTACKED", ())
    stacked = jax_instructblip.load(blip.source.folder)
    assert not is_unstacked(blip.variant, stacked.params) and is_unstacked(
        blip.variant, blip.params
    )
    stacked.stop_table = blip.stop_table
    asked = draw(blip, 60, words=20, seed=2)
    requests = prepared(blip, asked)
    check_same(blip, asked, ask_in_turn(make_engine(stacked, requests), requests))


one_kind = pytest.mark.parametrize("blip", ["t5"], indirect=True)


@pytest.fixture
def requests(blip):
    return prepared(blip, draw(blip, 8, words=5))


def lengthened(request):
    """The request with as many tokens as possible."""
    settings = request.settings._replace(min_new_tokens=np.int32(NEW))
    return request._replace(limit=np.int32(NEW), settings=settings)


@one_kind
def test_a_server_gets_answers_and_gives_them_up_from_its_own_loop(blip, requests):
    """`step` runs in a thread of its own."""
    expected = [handle.result() for handle in ask_in_turn(make_engine(blip, requests), requests)]
    engine, stop = make_engine(blip, requests), threading.Event()

    def work():
        while not stop.is_set():
            engine.step()

    async def ask():
        handles = [engine.submit(request) for request in [*map(lengthened, requests), *requests]]
        for handle in handles[: len(requests)]:
            asyncio.wrap_future(handle).cancel()
        answers = [await asyncio.wrap_future(handle) for handle in handles[len(requests) :]]
        return answers, [handle.done() for handle in handles]

    worker = threading.Thread(target=work)
    worker.start()
    try:
        answers, done = asyncio.run(ask())
    finally:
        stop.set()
        worker.join()
    assert answers == expected and all(done)


@one_kind
def test_the_slot_of_a_cancelled_request_is_free_with_the_next_step(blip, requests):
    engine = make_engine(blip, requests, steps=1)
    full = [engine.submit(lengthened(request)) for request in requests[:4]]
    waiting = engine.submit(requests[4])
    engine.step()
    engine.step()
    assert [len(handle.tokens) for handle in [*full, waiting]] == [3, 3, 3, 3, 0]
    engine.cancel(full[2])
    while not waiting.done():
        engine.step()
    # The first token comes from the prompt, each other one from a step.
    assert full[2].cancelled() and engine.steps == 2 + len(waiting.result().tokens) - 1
    assert engine.steps < NEW - 1 and not full[0].done()


@one_kind
def test_prompts_are_read_at_once_and_ahead_of_their_slots(blip, requests):
    alone = make_engine(blip, requests)
    expected = [handle.tokens for handle in ask_in_turn(alone, requests)]
    assert alone.reads == {1: 8}  # no other program before warm-up
    for prompts, reads in (8, {4: 2}), (3, {2: 4}):  # a power of two, no more than there are slots
        engine = make_engine(blip, requests, prompts=prompts)
        engine.warm_up(requests[:1])
        assert [handle.tokens for handle in ask_in_turn(engine, requests)] == expected
        assert engine.reads == reads


@pytest.mark.parametrize("blip", ["llama"], indirect=True)
def test_slots_are_taken_in_the_order_of_submission(blip):
    """Prompts of two padded shapes, each of which is read with others of its own."""
    both = zip(draw(blip, 6, words=3), draw(blip, 6, words=40, seed=1), strict=True)
    asked = [each for pair in both for each in pair]
    requests = prepared(blip, asked)
    assert len({request.batch["tokens"].shape for request in requests}) > 1
    engine = make_engine(blip, requests, steps=1, prompts=2)
    engine.warm_up(requests)
    handles = [engine.submit(request) for request in requests]
    while not all(handle.done() for handle in handles):
        engine.step()
        started = [handle.tokens != () for handle in handles]
        assert started == sorted(started, reverse=True)
    assert set(engine.reads) - {1} and engine.reads.total() < len(requests)
    check_same(blip, asked, handles)


@one_kind
def test_a_step_computes_as_few_slots_as_it_can(blip, requests):
    """The last request alone moves from its slot to the first one, and its answer stays."""
    alone = make_engine(blip, requests)
    expected = ask_in_turn(alone, [lengthened(requests[3])])[0].tokens
    assert alone.slot_steps == 4 * alone.steps == 4 * (NEW - 1)  # no other program before warm-up
    engine = make_engine(blip, requests)
    engine.warm_up(requests[:1])
    short = [request._replace(limit=np.int32(3)) for request in requests[:3]]
    handles = ask_in_turn(engine, [*short, lengthened(requests[3])])
    assert handles[3].tokens == expected and engine.steps == NEW - 1
    assert engine.slot_steps == 4 * 2 + (NEW - 3)


@one_kind
def test_a_cancelled_request_gives_its_prompt_back(blip, requests):
    engine = make_engine(blip, requests, steps=1)
    engine.warm_up(requests[:1])
    for request in requests[:3]:
        engine.submit(lengthened(request))
    engine.step()
    assert engine.reads == {2: 1, 1: 1}
    last, waiting, other = [engine.submit(lengthened(request)) for request in requests[3:6]]
    engine.step()
    assert engine.reads == {2: 2, 1: 1} and waiting.prompt and not waiting.tokens
    engine.cancel(waiting)
    engine.cancel(last)
    engine.step()
    assert waiting.prompt is None and waiting.cancelled() and len(other.tokens) == 2
    waiting = engine.submit(lengthened(requests[6]))
    engine.close()
    assert waiting.cancelled() and waiting.prompt is None


@one_kind
def test_closing_cancels_all(blip, requests):
    with make_engine(blip, requests, steps=1) as engine:
        handles = [engine.submit(lengthened(request)) for request in requests]
        engine.step()
    assert all(handle.cancelled() for handle in handles) and engine.step() == []
    with pytest.raises(ValueError, match="the engine is closed"):
        engine.submit(requests[0])


@one_kind
def test_what_does_not_fit_is_refused(blip, requests):
    width = requests[0].batch["tokens"].shape[1]
    engine = make_engine(blip, requests, width=width - 1, max_new_tokens=NEW - 1)
    message = f"has {width} slots, of at most {width - 1}; max_new_tokens is 24, of at most 23"
    with pytest.raises(ValueError, match=message):
        engine.submit(requests[0]._replace(limit=np.int32(NEW)))
    question, _ = draw(blip, 1, words=2)[0]
    with pytest.raises(ValueError, match="slots is 0, expected at least 1"):
        make_engine(blip, requests, slots=0)
    with pytest.raises(ValueError, match="num_beams is 3, but a slot has no beams"):
        prepare(blip.text, question, GenerationConfig(num_beams=3))


@one_kind
def test_a_request_that_cannot_be_admitted_leaves_no_answer_in_its_slot(blip, requests):
    """Its slot still holds the answer of the request before it."""
    engine = make_engine(blip, requests, slots=1)
    expected = [handle.result() for handle in ask_in_turn(engine, requests[:2])]
    images = {"images": requests[2].batch["images"][:, :, :14, :14]}
    handle = engine.submit(requests[2]._replace(batch=requests[2].batch | images))
    with pytest.raises(ValueError, match="images have shape .1, 14, 14, 3.") as error:
        engine.step()
    assert handle.exception(0) is error.value
    assert engine.step() == []
    assert [each.result() for each in ask_in_turn(engine, requests[:2])] == expected


@one_kind
def test_prompts_that_cannot_be_read_together_leave_the_queue(blip, requests, monkeypatch):
    engine = make_engine(blip, requests, slots=2)
    engine.warm_up(requests[:1])
    expected = [handle.tokens for handle in ask_in_turn(engine, requests)]
    handles = [engine.submit(request) for request in requests]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(engine, "_read", lambda some: len(some) / 0)
        engine.step()
    while not all(handle.done() for handle in handles):
        engine.step()
    assert [type(handle.exception()) for handle in handles[:2]] == [ZeroDivisionError] * 2
    assert [handle.tokens for handle in handles[2:]] == expected[2:]


@one_kind
def test_programs_are_compiled_beforehand_alone(blip, requests):
    engine = make_engine(blip, requests, steps=1)
    handle = engine.submit(lengthened(requests[0]))
    engine.step()
    with pytest.raises(ValueError, match="warm_up would spoil the answers of 1 slot"):
        engine.warm_up(requests)
    narrow = make_engine(blip, requests, width=requests[0].batch["tokens"].shape[1] - 1)
    with pytest.raises(ValueError, match="the request does not fit this engine"):
        narrow.warm_up(requests)
    assert not handle.done()


@one_kind
def test_scores_that_are_not_finite_harm_no_other_answer(blip, requests):
    """A slot that was full of NaN answers the next question as if nothing had been there."""
    expected = [handle.result() for handle in ask_in_turn(make_engine(blip, requests), requests)]
    engine = make_engine(blip, requests)
    healthy = engine._params
    engine._params = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), healthy)
    spoilt = [engine.submit(request) for request in requests[:4]]
    while not all(handle.done() for handle in spoilt):
        engine.step()
    for handle in spoilt:
        with pytest.raises(ValueError, match="not finite"):
            handle.result()
    engine._params = healthy
    assert [handle.result() for handle in ask_in_turn(engine, requests)] == expected


def ask_in_turn(engine, requests):
    handles = [engine.submit(request) for request in requests]
    while not all(handle.done() for handle in handles):
        engine.step()
    return handles


@one_kind
def test_a_cancelled_request_ends_no_loop_over_answers(blip, requests):
    engine = make_engine(blip, requests, steps=1)
    submit, handles = engine.submit, []
    engine.submit = lambda request: handles.append(submit(request)) or handles[-1]
    left = engine.answers(enumerate(map(lengthened, requests[:2])))

    def cancel_second(step=engine.step):
        handles[1].cancel()
        return step()

    engine.step = cancel_second
    assert [name for name, _ in left] == [0]


def test_a_mesh_is_refused():
    class OnMesh:
        mesh = object()

    with pytest.raises(ValueError, match="the model is on a mesh, but the engine works on one"):
        Engine(OnMesh(), slots=1, width=1, max_new_tokens=1)  # pyright: ignore[reportArgumentType]
