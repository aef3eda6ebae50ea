"""Attention against loops over float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.models.attention import (
    Attention,
    CachedKV,
    CurrentKV,
    attend,
    attend_cached,
    heads_first,
)
from jax_instructblip.models.masks import causal_mask, padding_mask
from tests.helpers.numerics import error

B, T, S, N, K, R = 2, 3, 5, 2, 4, 3


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32))


def slow_attend(query, key, value, mask, bias, scale):
    """[T, K] of one sample and head."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = query @ key.T * scale + bias
    weights = np.where(mask, np.exp(scores - scores[mask].max()), 0.0)
    return weights / weights.sum(-1, keepdims=True) @ value


@pytest.mark.parametrize("scale", [None, 1.0])
def test_attend_is_a_masked_softmax_average(scale):
    query, key, value = draw(B, T, N, K), draw(B, S, N, K, seed=1), draw(B, S, N, K, seed=2)
    bias = draw(1, N, T, S)
    mask = jnp.arange(S)[None, None, None] < jnp.array([S, 3])[:, None, None, None]
    found = attend(query, key, value, mask, bias, scale)
    for b in range(B):
        for n in range(N):
            expected = slow_attend(
                query[b, :, n],
                key[b, :, n],
                value[b, :, n],
                np.broadcast_to(mask[b, 0], (T, S)),
                bias[0, n],
                scale or K**-0.5,
            )
            assert error(found[b, :, n], expected) < 1e-6


def test_a_row_without_any_visible_key_is_finite():
    query, key = draw(1, T, N, K), draw(1, S, N, K)
    found = attend(query, key, key, jnp.zeros((1, 1, 1, S), bool))
    assert jnp.isfinite(found).all()


def test_dropout_is_applied_to_the_weights():
    query, key = draw(1, T, N, K), draw(1, S, N, K)
    whole = attend(query, key, key)
    np.testing.assert_array_equal(attend(query, key, key, dropout=lambda x: 2 * x), 2 * whole)


def test_bfloat16_scores_and_softmax_are_float32():
    # Scores near 1000 have steps of 4 in bfloat16: a softmax of rounded scores would be far off.
    query = jnp.asarray(30 * draw(1, 4, N, 16), jnp.bfloat16)
    key = jnp.asarray(draw(1, 32, N, 16, seed=1), jnp.bfloat16)
    value = jnp.asarray(draw(1, 32, N, 16, seed=2), jnp.bfloat16)
    found = attend(query, key, value, scale=1.0)
    expected = attend(*(x.astype(jnp.float32) for x in (query, key, value)), scale=1.0)
    assert found.dtype == jnp.bfloat16
    assert error(found, expected) < 0.01  # two roundings to 8 bits, of the weights and the result


@pytest.mark.parametrize("with_current", [True, False])
def test_cached_keys_and_the_newest_token_are_one_row_of_keys(with_current):
    query = draw(B, R, N, K)
    first = CachedKV(
        *(draw(B, N, S, K, seed=seed) for seed in (1, 2)),
        padding_mask(jnp.arange(S)[None] < jnp.array([[S], [2]])),
    )
    second = CachedKV(
        *(draw(B, N, T, K, seed=seed) for seed in (3, 4)),
        jnp.asarray(np.random.default_rng(0).random((B, 1, R, T)) < 0.7),
        draw(1, N, R, T, seed=5),
    )
    current = CurrentKV(draw(B, N, R, K, seed=6), draw(B, N, R, K, seed=7), draw(N, seed=8))
    found = attend_cached(query, [first, second], current if with_current else None)
    for b in range(B):
        for r in range(R):
            keys, values = (
                jnp.concatenate([*cached, newest[:, r][:, None]][: 2 + with_current], axis=1)
                for cached, newest in (
                    ((first.key[b], second.key[b]), current.key[b]),
                    ((first.value[b], second.value[b]), current.value[b]),
                )
            )  # [N, S + T + 1, K]
            biases = [jnp.zeros((N, S)), second.bias[0, :, r], current.bias[:, None]]
            shown = [first.mask[b, 0, 0], second.mask[b, 0, r], jnp.array([True])]
            expected = attend(
                query[b, r][None, None],
                heads_first(keys[None]),
                heads_first(values[None]),
                jnp.concatenate(shown[: 2 + with_current])[None, None, None],
                jnp.concatenate(biases[: 2 + with_current], axis=1)[None, :, None],
            )
            assert error(found[b, r], expected[0, 0]) < 1e-6


def test_attention_projects_each_head_and_joins_them():
    module = Attention(width=6, heads=N, head_width=K, dtype=jnp.float32, biases=("query", "out"))
    x, context = draw(B, T, 6), draw(B, S, 5)
    variables = jax.jit(module.init)(jax.random.key(0), x, context)
    shapes = jax.tree.map(lambda leaf: leaf.shape, variables["params"])
    assert shapes == {
        "query": {"kernel": (6, N, K), "bias": (N, K)},
        "key": {"kernel": (5, N, K)},
        "value": {"kernel": (5, N, K)},
        "out": {"kernel": (N, K, 6), "bias": (6,)},
    }
    params = jax.tree.map(lambda leaf: np.asarray(draw(*leaf.shape)), variables["params"])
    into = lambda x, name: np.einsum("bsd,dnk->bsnk", x, params[name]["kernel"])
    query = into(x, "query") + params["query"]["bias"]
    mixed = attend(*map(jnp.asarray, (query, into(context, "key"), into(context, "value"))))
    expected = np.einsum("btnk,nkd->btd", mixed, params["out"]["kernel"]) + params["out"]["bias"]
    assert error(jax.jit(module.apply)({"params": params}, x, context), expected) < 1e-6


def test_a_sample_of_a_causal_row_sees_its_own_keys_only():
    query, key = draw(1, 4, N, K), draw(1, 4, N, K, seed=1)
    mask = causal_mask(jnp.array([[1, 1, 2, 2]]))
    found = attend(query, key, key, mask)
    assert error(found[:, 3:], attend(query[:, 3:], key[:, 2:], key[:, 2:])) < 1e-6
    assert error(found[:, 1:2], attend(query[:, 1:2], key[:, :2], key[:, :2])) < 1e-6
