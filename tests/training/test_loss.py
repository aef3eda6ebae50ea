import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.data.batch import IGNORE
from jax_instructblip.models.dense import word_logits
from jax_instructblip.models.flops import count
from jax_instructblip.training import loss
from jax_instructblip.training.loss import count_targets, cross_entropy, word_loss

FLOAT32 = jnp.dtype(jnp.float32)
ROWS, TARGETS, WIDTH, WORDS = 8, 7, 5, 11


@pytest.fixture(scope="module")
def head():
    """States [G, A, D], kernels by their axes, and targets, of which the last two are padding."""
    rng = np.random.default_rng(2)
    x = jnp.array(rng.normal(size=(ROWS, TARGETS, WIDTH)), jnp.float32)
    kernel = jnp.array(rng.normal(size=(WIDTH, WORDS)), jnp.float32)
    targets = rng.integers(0, WORDS, (ROWS, TARGETS))
    targets[:, -2:] = IGNORE
    return x, {"DV": kernel, "VD": kernel.T}, jnp.array(targets)


def plain(x, kernel, axes, targets, dtype):
    """The loss with all logits at once."""
    return cross_entropy(word_logits(x, kernel, axes, dtype), targets)


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


@pytest.mark.parametrize("axes", ["DV", "VD"])
@pytest.mark.parametrize("chunk", [1_000, 24, 16, 1])  # 1, 2, 3 and 7 chunks; 24, 16: unequal ones
def test_chunks_of_logits_give_the_same_loss_and_gradients(head, monkeypatch, axes, chunk):
    x, kernels, targets = head
    monkeypatch.setattr(loss, "CHUNK", chunk)
    both = lambda function: jax.value_and_grad(
        lambda x, kernel: 3 * function(x, kernel, axes, targets, FLOAT32), argnums=(0, 1)
    )(x, kernels[axes])
    found, expected = both(word_loss), both(plain)
    for each, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(each, other, atol=1e-6 * np.abs(other).max())
    assert np.all(np.asarray(found[1][0][:, -2:]) == 0)
    alone = word_loss(x, kernels[axes], axes, targets, FLOAT32)
    np.testing.assert_allclose(3 * alone, found[0], rtol=1e-6)


def test_factors_of_the_products_are_narrow_and_sums_wide(head):
    x, kernels, targets = head
    narrow = jnp.dtype(jnp.bfloat16)
    gradient = jax.grad(word_loss, argnums=(0, 1))
    jaxpr = jax.make_jaxpr(gradient, static_argnums=(2, 4))(x, kernels["DV"], "DV", targets, narrow)
    products = [each for each in jaxpr.jaxpr.eqns if each.primitive.name == "dot_general"]
    assert len(products) == 3
    for each in products:
        assert [factor.aval.dtype for factor in each.invars] == [narrow, narrow]
        assert each.outvars[0].aval.dtype == FLOAT32
    rounded = [leaf.astype(narrow).astype(jnp.float32) for leaf in (x, kernels["DV"])]
    found = gradient(x, kernels["DV"], "DV", targets, narrow)
    expected = gradient(*rounded, "DV", targets, FLOAT32)
    for each, other in zip(found, expected, strict=True):
        assert each.dtype == FLOAT32
        np.testing.assert_allclose(each, other, rtol=2e-2, atol=2e-2)


def test_a_frozen_head_costs_two_products_and_keeps_no_logits(head, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 8)
    x, kernels, targets = head
    value = lambda x: word_loss(x, kernels["DV"], "DV", targets, FLOAT32)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(value))(x).jaxpr
    product = 2 * ROWS * TARGETS * WIDTH * WORDS
    assert count(jaxpr) == 2 * product
    held = [each.aval.size for equation in jaxpr.eqns for each in equation.outvars]
    assert max(held) <= ROWS * TARGETS * max(WIDTH, WORDS // TARGETS)
