import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.inference.sampling import argmax, best_of_rows


@pytest.mark.parametrize("vocab", [3, 61, 128, 300])
@pytest.mark.parametrize("kind", ["distinct", "ties", "masked"])
def test_best_of_rows_is_top_k_of_the_flat_rows(vocab, kind):
    rng, count = np.random.default_rng(vocab), 10
    scores = rng.standard_normal((3, 5, vocab)).astype(np.float32)
    if kind == "ties":  # also over more blocks than are looked into
        scores = np.round(scores)
    if kind == "masked":
        scores[rng.random(scores.shape) < 0.9] = -np.inf
    values, places = best_of_rows(jnp.asarray(scores), count)
    expected = jax.lax.top_k(jnp.asarray(scores).reshape(3, -1), count)
    np.testing.assert_array_equal(values, expected[0])
    finite = np.isfinite(values)
    assert finite.any()
    np.testing.assert_array_equal(np.asarray(places)[finite], np.asarray(expected[1])[finite])
    assert (np.asarray(places)[finite] < 5 * vocab).all()


def test_best_is_the_first_of_equal_ones():
    scores = jnp.array([[1.0, 3.0, 3.0, -jnp.inf], [-jnp.inf, -2.0, -3.0, -2.0]])
    assert argmax(scores).tolist() == jnp.argmax(scores, axis=-1).tolist() == [1, 1]
