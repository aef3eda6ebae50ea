"""The ends of answers by a table: in greedy decoding, streams and beam searches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.inference import stops
from jax_instructblip.inference.beam_search import beam_tokens
from jax_instructblip.inference.decode import generate_tokens, stream_tokens
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.sampling import row_keys, seed_key
from jax_instructblip.models.vlm import VisionLanguageModel
from tests.helpers.numerics import random_params
from tests.helpers.rows import to_answer
from tests.helpers.tiny import make_batch, tiny_variant

VARIANT = tiny_variant("llama")
VOCAB, EOS, PAD = VARIANT.llm.vocab, VARIANT.llm.eos_id, VARIANT.llm.pad_id
NEW, ROWS = 7, 4


def table_of(*ids, sequence=()):
    """The table by which an answer ends with eos, one of `ids`, or a `sequence` of two ids."""
    table = np.zeros((1 + bool(sequence), VOCAB), np.int8)
    if sequence:
        table[:, sequence[0]] = 1
        table[1, sequence[1]] = 2
    table[:, [EOS, *ids]] = len(table)
    return table


@pytest.fixture(scope="module")
def model():
    params = random_params(VARIANT, seed=3)
    model = VisionLanguageModel(VARIANT)
    return model, *jax.tree.map(jnp.asarray, (params, to_answer(make_batch(VARIANT, ROWS))))


def generate(model, config, table=None, rows=None):
    model, params, batch = model
    keys = row_keys(seed_key(0), np.arange(ROWS, dtype=np.int32))
    return jax.device_get(generate_tokens(model, params, batch, keys, config, table))


@functools.cache
def greedy():
    return GenerationConfig(max_new_tokens=NEW)


def test_states_and_ends():
    table = table_of(9, sequence=(4, 5))
    state = stops.first_states(table, (5, 1))
    rows = jnp.array([[4, 5, 0], [4, 4, 5], [9, 0, 0], [4, 6, 5], [EOS, 4, 5]])
    seen = []
    for step in range(3):
        token = rows[:, step : step + 1]
        state = stops.next_states(table, state, token)
        seen.append(stops.have_ended(table, EOS, state, token)[:, 0].tolist())
    assert np.array(seen).T.tolist() == [
        [False, True, True],
        [False, False, True],
        [True, True, True],
        [False, False, False],
        [True, True, True],
    ]
    assert stops.lengths(table, EOS, rows[:, None])[:, 0].tolist() == [2, 3, 1, 3, 1]
    ends = stops.ends(table, EOS, jnp.array([[0], [1]]), (2, 1, VOCAB))
    assert np.flatnonzero(ends[0, 0]).tolist() == sorted([EOS, 9])
    assert np.flatnonzero(ends[1, 0]).tolist() == sorted([EOS, 5, 9])


def test_without_a_table_eos_ends_an_answer():
    tokens = jnp.array([[[5, 2, 2], [2, 0, 0], [5, 5, 5], [5, 5, 2]]])
    assert stops.lengths(None, 2, tokens).tolist() == [[2, 1, 3, 3]]
    assert stops.first_states(None, (1, 1)) is None
    assert stops.have_ended(None, 2, None, tokens)[0, 0].tolist() == [False, True, True]
    assert np.flatnonzero(stops.ends(None, 2, None, (1, 1, 9))[0, 0]).tolist() == [2]


def test_greedy_answers_end_at_the_stop_and_are_else_the_same(model):
    whole = generate(model, greedy())
    first = whole["tokens"][:, 0]
    table = table_of(int(first[0, 2]), sequence=tuple(first[1, 1:3].tolist()))
    made = generate(model, greedy(), table)
    for row, ids in enumerate(first.tolist()):
        end = next((n for n in range(1, NEW + 1) if ended(table, ids[:n])), NEW)
        assert made["lengths"][row, 0] == end
        assert made["tokens"][row, 0].tolist() == [*ids[:end], *[PAD] * (NEW - end)]
        np.testing.assert_array_equal(made["logprobs"][row, 0, end:], 0)
    assert made["lengths"][0, 0] <= 3 and made["lengths"][1, 0] <= 3
    assert made["steps"] == made["lengths"].max()


def test_a_table_of_eos_alone_changes_no_answer(model):
    for config in (greedy(), GenerationConfig(max_new_tokens=NEW, temperature=0.9)):
        for name, leaf in generate(model, config).items():
            np.testing.assert_array_equal(leaf, generate(model, config, table_of())[name])


def ended(table, ids):
    state = 0
    for i in ids:
        state = table[state, i]
        if state == len(table):
            return True
    return False


def test_no_answer_ends_before_min_new_tokens(model):
    first = generate(model, greedy())["tokens"][:, 0]
    table = table_of(int(first[0, 0]), sequence=tuple(first[1, :2].tolist()))
    made = generate(model, GenerationConfig(max_new_tokens=NEW, min_new_tokens=4), table)
    assert made["lengths"].min() > 4 or made["lengths"].min() >= 4
    for row in made["tokens"][:, 0].tolist():
        assert not ended(table, row[:4])


def test_a_stream_ends_at_the_stop(model):
    first = generate(model, greedy())["tokens"][:, 0]
    table = table_of(*first[:, 2].tolist())
    made = generate(model, greedy(), table)
    own, params, batch = model
    keys = row_keys(seed_key(0), np.arange(ROWS, dtype=np.int32))
    parts = list(stream_tokens(own, params, batch, keys, greedy(), table))
    assert len(parts) == made["steps"] <= 3
    found = np.stack([tokens for tokens, _ in parts], axis=1)
    np.testing.assert_array_equal(found, made["tokens"][:, 0, : len(parts)])


@pytest.fixture(scope="module")
def brute(model):
    """Log-probabilities of the next token behind any beginning, of the first row alone."""
    own, params, batch = model

    @jax.jit
    def next_logprobs(ids):
        logits, cache = own.apply({"params": params}, batch, 4, method="prefill")
        found = [logits[:1, 0]]
        for i in range(3):
            token = jnp.broadcast_to(ids[i], (ROWS, 1))
            logits, cache = own.apply({"params": params}, token, cache, method="decode_step")
            found.append(logits[:1, 0])
        return jax.nn.log_softmax(jnp.concatenate(found))

    known = {}

    def look_up(ids):
        if ids not in known:
            padded = jnp.array([*ids, *[0] * (3 - len(ids))], jnp.int32)
            known[ids] = np.asarray(next_logprobs(padded), np.float64)[len(ids)]
        return known[ids]

    return look_up


@pytest.mark.parametrize("sequence", [(), (7, 11)])
def test_a_beam_search_with_stops_is_that_of_transformers(model, brute, sequence):
    """The search of transformers 5 written out, where many ids end an answer at once."""
    beams, length = 3, 4
    best = np.argsort(-brute(()))
    table = table_of(*best[[1, 2, 4, 5, 6, 8]].tolist(), sequence=sequence)
    if sequence:
        table[:, best[0]], table[1, best[:20]] = 1, 2  # the best token begins, many end
    settings = dict(num_beams=beams, num_return_sequences=beams, max_new_tokens=length)
    config = GenerationConfig(length_rule="transformers5", early_stopping="never", **settings)
    made = jax.device_get(beam_tokens(*model, config, table))
    running, answers = [((), 0.0)], []
    for step in range(length):
        found = [
            (ids + (i,), total + value)
            for ids, total in running
            for i, value in enumerate(brute(ids))
        ]
        found.sort(key=lambda each: -each[1])
        last = step + 1 == length
        for ids, total in found[:beams]:
            if ended(table, ids) or last:
                answers.append((ids, total / len(ids)))
        running = list(itertools.islice((f for f in found if not ended(table, f[0])), beams))
    answers.sort(key=lambda each: -each[1])
    for rank, (ids, score) in enumerate(answers[:beams]):
        assert made["tokens"][0, rank, : made["lengths"][0, rank]].tolist() == list(ids)
        assert abs(made["scores"][0, rank] - score) < 1e-4
    assert len({len(ids) for ids, _ in answers[:beams]}) >= 1


def test_a_beam_search_with_eos_alone_in_the_table_is_the_same(model):
    config = GenerationConfig(max_new_tokens=NEW, num_beams=3, num_return_sequences=3)
    plain = jax.device_get(beam_tokens(*model, config))
    for name, leaf in jax.device_get(beam_tokens(*model, config, table_of())).items():
        np.testing.assert_array_equal(leaf, plain[name])
