import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip.models.cache import expand_beams
from jax_instructblip.models.llama import Llama, frequencies, rotary, rotate
from tests.helpers.numerics import error, random_params, small

CONFIG = small("vicuna").llm
PARAMS = jax.tree.map(jnp.asarray, random_params(small("vicuna"))["llm"])
MODEL = Llama(CONFIG, jnp.float32)
DRAW = np.random.default_rng(0)
INPUTS = jnp.asarray(DRAW.standard_normal((3, 9, CONFIG.width), np.float32))
LENGTHS = (5, 9, 7)
TURNS = frequencies(dataclasses.replace(CONFIG, head_size=8))


def rows(inputs, valid, skip=0):
    """Arguments of a call for one sample a row, all slots but the first `skip` asked for."""
    index = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape[:2])
    return inputs, valid.astype(jnp.int32), index, index[:, skip:]


@functools.cache
def call(skip=0):
    return jax.jit(
        lambda inputs, valid: MODEL.apply({"params": PARAMS}, *rows(inputs, valid, skip))
    )


@jax.jit
def prefill(inputs, valid):
    return MODEL.apply({"params": PARAMS}, inputs, valid, 3, method="prefill")


@jax.jit
def step(token, cache):
    return MODEL.apply({"params": PARAMS}, token, cache, method="decode_step")


def valid(lengths, width):
    return jnp.arange(width)[None] < jnp.array(lengths)[:, None]


def test_rotary_turns_pair_k_by_position_over_theta_to_the_2k():
    positions = jnp.array([[0, 1, 7, 2047]])
    cosine, sine = rotary(positions, TURNS, jnp.float32)
    assert cosine.shape == sine.shape == (1, 4, 8)
    x = DRAW.standard_normal((1, 4, 1, 8)).astype(np.float32)
    pairs = x[..., :4] + 1j * x[..., 4:]  # (k, k + K/2)
    angle = np.array([0, 1, 7, 2047])[:, None] * 10_000.0 ** (-2 * np.arange(4) / 8)
    turned = pairs * np.exp(1j * angle)[None, :, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    # 1e-4: float32 angles near 2047 are 1e-4 apart, in PyTorch as well.
    assert error(rotate(jnp.asarray(x), (cosine, sine)), expected) < 1e-4
    assert error(rotate(jnp.asarray(x), (cosine, sine))[:, :3], expected[:, :3]) < 1e-6


def test_scores_depend_on_the_distance_alone():
    query, key = (jnp.asarray(DRAW.standard_normal((1, 1, 1, 8), np.float32)) for _ in range(2))
    score = []
    for start in (0, 100):
        at = lambda position: rotary(jnp.array([[position]]), TURNS, jnp.float32)
        score.append((rotate(query, at(start + 5)) * rotate(key, at(start))).sum())
    assert abs(score[0] - score[1]) < 1e-4


def test_rotary_is_computed_in_float32():
    # bfloat16 cannot tell position 257 from 256.
    cosine, _ = rotary(jnp.array([[256, 257]]), TURNS, jnp.bfloat16)
    assert cosine.dtype == jnp.bfloat16
    assert error(cosine[0, :, 0], np.cos([256.0, 257.0])) < 0.01


def test_slots_that_nobody_asks_for_get_no_logits():
    whole = call()(INPUTS, valid(LENGTHS, 9))
    assert whole.shape == (3, 9, CONFIG.vocab) and whole.dtype == jnp.float32
    np.testing.assert_allclose(call(4)(INPUTS, valid(LENGTHS, 9)), whole[:, 4:], atol=1e-5)


def test_a_position_sees_nothing_after_it():
    whole = call()(INPUTS, valid((9, 9, 9), 9))
    changed = call()(INPUTS.at[:, 6:].add(1), valid((9, 9, 9), 9))
    assert error(changed[:, :6], whole[:, :6]) < 1e-6
    assert error(changed[:, 6:], whole[:, 6:]) > 1e-2


def test_padding_is_invisible():
    together = call()(INPUTS, valid(LENGTHS, 9))
    longer = jnp.pad(INPUTS, ((0, 0), (0, 4), (0, 0)), constant_values=3.0)
    longer = call()(longer, valid(LENGTHS, 13))
    for row, length in enumerate(LENGTHS):
        alone = call()(INPUTS[row : row + 1, :length], jnp.ones((1, length), bool))
        assert error(together[row, :length], alone[0]) < 1e-5
        assert error(longer[row, :length], alone[0]) < 1e-5


def test_samples_of_a_row_do_not_see_each_other():
    """Two samples in a row of their own order; each as if it were alone."""
    for first, second in ((2, 0), (1, 1)):
        a, b = LENGTHS[first], LENGTHS[second]
        inputs = jnp.concatenate([INPUTS[first, :a], INPUTS[second, :b], INPUTS[0, :2]])[None]
        segments = jnp.array([[1] * a + [2] * b + [0] * 2])
        positions = jnp.array([[*range(a), *range(b), 0, 0]])
        asked = jnp.arange(a + b)[None]
        found = MODEL.apply({"params": PARAMS}, inputs, segments, positions, asked)[0]
        alone = call()(INPUTS, valid(LENGTHS, 9))
        assert error(found[:a], alone[first, :a]) < 1e-5
        assert error(found[a:], alone[second, :b]) < 1e-5


def test_cached_steps_are_whole_rows():
    """Prefill and two steps at two padded lengths, with three rows of their own a sample."""
    tokens = jnp.asarray(DRAW.integers(0, CONFIG.vocab, (3, 3, 2)))  # [B, R, steps]
    embedding = PARAMS["embed"]["embedding"]
    for width in (9, 11):
        inputs = jnp.pad(INPUTS, ((0, 0), (0, width - 9), (0, 0)), constant_values=3.0)
        first, cache = prefill(inputs, valid(LENGTHS, width))
        assert first.shape == (3, 1, CONFIG.vocab)
        assert cache["prefix"]["key"].shape == (3, 3, CONFIG.heads, width, CONFIG.head_width)
        assert cache["tail"]["key"].shape == (3, 3, CONFIG.heads, 3, CONFIG.head_width)
        second, cache = step(tokens[..., 0], expand_beams(cache, 3))
        third, cache = step(tokens[..., 1], cache)
        assert cache["step"] == 2
        for b, r in ((0, 0), (1, 2), (2, 1)):
            row = jnp.concatenate([INPUTS[b, : LENGTHS[b]], embedding[tokens[b, r]]])[None]
            row = jnp.pad(row, ((0, 0), (0, 11 - row.shape[1]), (0, 0)))
            expected = call()(row, valid([LENGTHS[b] + 2], 11))[0, LENGTHS[b] - 1 :]
            found = jnp.stack([first[b, 0], second[b, r], third[b, r]])
            assert error(found, expected[:3]) < 1e-5


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
    embedding = PARAMS["embed"]["embedding"]
    for b, length in enumerate(LENGTHS):
        for line, at in (([7, 8, 9], [0, 1, 2]), ([7, 5], [0, 3])):
            row = jnp.concatenate([INPUTS[b, :length], embedding[jnp.array(line)]])[None]
            row = jnp.pad(row, ((0, 0), (0, 12 - row.shape[1]), (0, 0)))
            expected = call()(row, valid([length + len(line)], 12))[0, length : length + len(line)]
            assert error(found[b, jnp.array(at)], expected) < 1e-5


def test_bfloat16_survives_large_activations():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    apply = jax.jit(Llama(CONFIG, jnp.bfloat16).apply)
    inputs = jnp.asarray(1e5 * INPUTS, jnp.bfloat16)
    found = apply({"params": params}, *rows(inputs, valid(LENGTHS, 9)))
    assert found.dtype == jnp.float32 and jnp.isfinite(found).all()
