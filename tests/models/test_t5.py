import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.models.cache import expand_beams
from jax_instructblip.models.t5 import T5, relative_bucket
from tests.helpers.numerics import error, random_params, small

CONFIG = small("t5").llm
PARAMS = jax.tree.map(jnp.asarray, random_params(small("t5"))["llm"])
MODEL = T5(CONFIG, jnp.float32)
DRAW = np.random.default_rng(0)
INPUTS = jnp.asarray(DRAW.standard_normal((3, 9, CONFIG.width), np.float32))
LENGTHS = (5, 9, 7)
ANSWERS = jnp.asarray(DRAW.integers(0, CONFIG.vocab, (3, 4)))


def rows(inputs, valid, answers):
    """Arguments of a call for one sample a row, all slots of the decoder asked for."""
    index = lambda leaf: jnp.broadcast_to(jnp.arange(leaf.shape[1]), leaf.shape[:2])
    segments = valid.astype(jnp.int32)
    return inputs, segments, index(inputs), index(answers), answers, jnp.ones_like(answers)


@jax.jit
def call(inputs, valid, answers):
    return MODEL.apply({"params": PARAMS}, *rows(inputs, valid, answers))


@jax.jit
def prefill(inputs, valid):
    return MODEL.apply({"params": PARAMS}, inputs, valid, 3, method="prefill")


@jax.jit
def step(token, cache):
    return MODEL.apply({"params": PARAMS}, token, cache, method="decode_step")


def valid(lengths, width):
    return jnp.arange(width)[None] < jnp.array(lengths)[:, None]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, furthest", [(32, 128), (8, 20)])
def test_relative_buckets_are_those_of_pytorch(bidirectional, buckets, furthest):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-700, 701)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(distance), bidirectional, buckets, furthest
    )
    found = relative_bucket(jnp.asarray(distance), buckets, furthest, bidirectional)
    np.testing.assert_array_equal(found, expected)


def test_near_distances_have_buckets_of_their_own():
    distance = jnp.arange(-3, 4)
    assert relative_bucket(distance, 32, 128, True).tolist() == [3, 2, 1, 0, 17, 18, 19]
    assert relative_bucket(distance, 32, 128, False).tolist() == [3, 2, 1, 0, 0, 0, 0]


def test_the_encoder_looks_both_ways_the_decoder_back():
    whole = call(INPUTS, valid((9, 9, 9), 9), ANSWERS)
    assert whole.shape == (3, 4, CONFIG.vocab) and whole.dtype == jnp.float32
    changed = call(INPUTS.at[:, 8].add(1), valid((9, 9, 9), 9), ANSWERS)
    assert error(changed[:, 0], whole[:, 0]) > 1e-3
    changed = call(INPUTS, valid((9, 9, 9), 9), ANSWERS.at[:, 2:].set(0))
    assert error(changed[:, :2], whole[:, :2]) < 1e-6
    assert error(changed[:, 2:], whole[:, 2:]) > 1e-2


def test_padding_is_invisible():
    answered = (1, 4, 3)
    together = call(INPUTS, valid(LENGTHS, 9), ANSWERS)
    longer = jnp.pad(INPUTS, ((0, 0), (0, 4), (0, 0)), constant_values=3.0)
    answers = jnp.pad(ANSWERS, ((0, 0), (0, 2)), constant_values=7)
    longer = call(longer, valid(LENGTHS, 13), answers)
    for row, (length, count) in enumerate(zip(LENGTHS, answered, strict=True)):
        inputs = INPUTS[row : row + 1, :length]
        alone = call(inputs, jnp.ones((1, length), bool), ANSWERS[row : row + 1, :count])
        assert error(together[row, :count], alone[0]) < 1e-5
        assert error(longer[row, :count], alone[0]) < 1e-5


def test_samples_of_a_row_do_not_see_each_other():
    """Two samples share a row of the encoder and one of the decoder; each as if it were alone."""
    (first, a, u), (second, b, w) = (2, 7, 3), (0, 5, 4)
    inputs = jnp.concatenate([INPUTS[first, :a], INPUTS[second, :b], INPUTS[0, :2]])[None]
    segments = jnp.array([[1] * a + [2] * b + [0] * 2])
    answers = jnp.concatenate([ANSWERS[first, :u], ANSWERS[second, :w], ANSWERS[0, :1]])[None]
    answered = jnp.array([[1] * u + [2] * w + [0]])
    asked = jnp.array([[*range(u + w), u + w + 1]])  # the last: nowhere
    apply = jax.jit(MODEL.apply)
    found = apply({"params": PARAMS}, inputs, segments, segments, asked, answers, answered)[0]
    alone = call(INPUTS, valid(LENGTHS, 9), ANSWERS)
    assert error(found[:u], alone[first, :u]) < 1e-5
    assert error(found[u : u + w], alone[second, :w]) < 1e-5


def test_cached_steps_are_whole_rows():
    """Prefill and two steps at two padded lengths, with three rows of their own a sample."""
    tokens = jnp.asarray(DRAW.integers(0, CONFIG.vocab, (3, 3, 2)))  # [B, R, steps]
    for width in (9, 11):
        inputs = jnp.pad(INPUTS, ((0, 0), (0, width - 9), (0, 0)), constant_values=3.0)
        first, cache = prefill(inputs, valid(LENGTHS, width))
        assert first.shape == (3, 1, CONFIG.vocab)
        assert cache["prefix"]["key"].shape == (2, 3, CONFIG.heads, width, CONFIG.head_width)
        assert cache["tail"]["key"].shape == (2, 3, CONFIG.heads, 4, CONFIG.head_width)
        second, cache = step(tokens[..., 0], expand_beams(cache, 3))
        third, cache = step(tokens[..., 1], cache)
        assert cache["step"] == 3  # the start id and two tokens
        for r in range(3):
            start = jnp.full((3, 1), CONFIG.decoder_start_id)
            answers = jnp.concatenate([start, tokens[:, r]], axis=1)
            expected = call(INPUTS, valid(LENGTHS, 9), answers)
            found = jnp.stack([first[:, 0], second[:, r], third[:, r]], axis=1)
            assert error(found, expected) < 1e-5


def test_a_tree_of_tokens_is_whole_rows():
    """The tree (7 (8 9) 5) behind prompts of several lengths, the prompt padded further."""
    tokens, depths = jnp.array([[7, 8, 9, 5]]), jnp.array([[1, 2, 3, 2]])
    ends = jnp.array([[4, 3, 3, 4]])
    inputs = jnp.pad(INPUTS, ((0, 0), (0, 2), (0, 0)), constant_values=3.0)
    _, cache = prefill(inputs, valid(LENGTHS, 11))

    def read(model, *tree):
        return model.logits(model.decode_tree(*tree))

    apply = jax.jit(lambda *tree: MODEL.apply({"params": PARAMS}, *tree, method=read))
    found = apply(tokens, depths, ends, cache)
    each = apply(*(jnp.tile(leaf, (3, 1)) for leaf in (tokens, depths, ends)), cache)
    np.testing.assert_allclose(each, found, rtol=0, atol=1e-6)
    for line, at in (([7, 8, 9], [0, 1, 2]), ([7, 5], [0, 3])):
        answers = jnp.tile(jnp.array([CONFIG.decoder_start_id, *line]), (3, 1))
        expected = call(INPUTS, valid(LENGTHS, 9), answers)
        assert error(found[:, jnp.array(at)], expected[:, 1:]) < 1e-5


def test_dropout_of_the_frozen_model_is_drawn_in_training():
    apply = jax.jit(functools.partial(MODEL.apply, train=True))
    given = rows(INPUTS, valid(LENGTHS, 9), ANSWERS)
    found = [
        apply({"params": PARAMS}, *given, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert error(found[2], found[0]) > 1e-2


def test_bfloat16_survives_large_activations():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    apply = jax.jit(T5(CONFIG, jnp.bfloat16).apply)
    inputs = jnp.asarray(1e5 * INPUTS, jnp.bfloat16)
    found = apply({"params": params}, *rows(inputs, valid(LENGTHS, 9), ANSWERS))
    assert found.dtype == jnp.float32 and jnp.isfinite(found).all()
