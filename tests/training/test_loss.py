import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.data.batch import IGNORE
from jax_instructblip.training.loss import count_targets, cross_entropy


def test_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1.0, 1.0, 1.0]]]))
    targets = jnp.array([[0, 1, IGNORE]])
    total, count = cross_entropy(logits, targets), count_targets(targets)
    assert count == 2
    np.testing.assert_allclose(total, -np.log(0.5) - np.log(0.8), rtol=1e-6)


def test_equals_torch():
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 17)).astype(np.float32) * 4
    targets = np.where(rng.random((3, 5)) < 0.4, IGNORE, rng.integers(0, 17, (3, 5)))
    total, count = cross_entropy(jnp.array(logits), jnp.array(targets)), count_targets(targets)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).reshape(-1, 17), torch.tensor(targets).reshape(-1), ignore_index=IGNORE
    )
    np.testing.assert_allclose(total / count, expected.item(), rtol=1e-6)


def test_is_the_mean_over_the_tokens_of_all_shards():
    rng = np.random.default_rng(1)
    logits = jnp.array(rng.normal(size=(4, 6, 9)), jnp.float32)
    targets = np.array(rng.integers(0, 9, (4, 6)))
    targets[:2, 1:] = IGNORE  # two shards with 2 and 12 targets: a mean of means would differ
    both = lambda logits, targets: (cross_entropy(logits, targets), count_targets(targets))
    total, count = both(logits, jnp.array(targets))
    parts = [both(logits[i : i + 2], jnp.array(targets[i : i + 2])) for i in (0, 2)]
    np.testing.assert_allclose(sum(t for t, _ in parts), total, rtol=1e-6)
    assert sum(c for _, c in parts) == count
    mean_of_means = np.mean([t / c for t, c in parts])
    assert abs(mean_of_means - total / count) > 0.01


def test_computes_in_float32_whatever_the_logits_are():
    logits = jnp.full((1, 1, 40_000), 3.0, jnp.bfloat16)
    total = cross_entropy(logits, jnp.array([[7]]))
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, np.log(40_000), rtol=1e-6)


def test_has_no_gradient_where_nothing_is_asked():
    targets = jnp.array([[1, IGNORE]])
    gradient = jax.grad(lambda logits: cross_entropy(logits, targets))(jnp.ones((1, 2, 3)))
    assert np.all(np.asarray(gradient[0, 1]) == 0)
    assert np.all(np.asarray(gradient[0, 0]) != 0)


def test_nothing_asked_at_all_is_zero():
    targets = jnp.full((2, 3), IGNORE)
    assert cross_entropy(jnp.ones((2, 3, 4)), targets) == count_targets(targets) == 0
