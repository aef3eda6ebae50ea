import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.models import dense as dense_module
from jax_instructblip.models.dense import Dense, Head, kernel_by_word
from jax_instructblip.models.flops import products
from jax_instructblip.models.layers import Mlp
from tests.helpers.numerics import error

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 3, 8), np.float32))


@pytest.mark.parametrize(
    ("features", "contracted", "use_bias"), [((5,), 1, True), ((2, 3), 1, True), ((5,), 2, False)]
)
def test_dense_is_that_of_flax_in_float32(features, contracted, use_bias):
    axes = tuple(range(-contracted, 0))
    theirs = nn.DenseGeneral(features, axis=axes, use_bias=use_bias)
    ours = Dense(features, jnp.float32, use_bias, contracted)
    params = theirs.init(jax.random.key(1), X)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(1), X), params)
    params = jax.tree.map(lambda leaf: leaf + 0.5, params)
    square = lambda module: lambda params, x: jnp.square(module.apply(params, x)).sum()
    assert error(ours.apply(params, X), theirs.apply(params, X)) < 1e-6
    found, expected = (jax.grad(square(each), (0, 1))(params, X) for each in (ours, theirs))
    for leaf, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error(leaf, right) < 1e-6


def narrow(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.bfloat16)


def test_a_wide_dense_does_not_round_what_it_sums():
    x, params = narrow(64, 32), {"kernel": narrow(32, 48), "bias": narrow(48)}
    exact = np.asarray(x, np.float64) @ np.asarray(params["kernel"], np.float64)
    exact += np.asarray(params["bias"], np.float64)
    apply = lambda **more: Dense((48,), jnp.bfloat16, **more).apply({"params": params}, x)
    for dtype in (jnp.float32, jnp.bfloat16):  # that of the bias makes no difference
        found = apply(wide=True, bias_dtype=dtype)
        assert found.dtype == jnp.float32 and error(found, exact) < 1e-6


def test_a_dense_rounds_once():
    x, params = narrow(64, 32), {"kernel": narrow(32, 48), "bias": X[0, 0, 0] + jnp.arange(48.0)}
    exact = np.asarray(x, np.float64) @ np.asarray(params["kernel"], np.float64)
    exact += np.asarray(params["bias"], np.float64)
    found = Dense((48,), jnp.bfloat16).apply({"params": params}, x)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
    fused = Dense((48,), jnp.bfloat16, bias_dtype=jnp.bfloat16).apply({"params": params}, x)
    assert found.dtype == fused.dtype == jnp.bfloat16 and error(fused, exact) < 1e-2


@pytest.mark.parametrize("wide", [False, True])
def test_gradients_of_weights_are_summed_in_float32(wide):
    # In bfloat16, 1001 is 1000.
    params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    dense = Dense((3,), jnp.bfloat16, wide=wide)
    total = lambda params: dense.apply(params, jnp.ones((1001, 2))).sum()
    found = jax.grad(total)({"params": params})["params"]
    assert found["bias"].dtype == jnp.float32 and found["bias"].tolist() == [1001] * 3
    assert found["kernel"].dtype == jnp.float32 and found["kernel"].tolist() == [[1001] * 3] * 2


def test_a_frozen_kernel_costs_no_product():
    params = Mlp(8, 5, jnp.float32).init(jax.random.key(0), X)
    total = lambda params, x: Mlp(8, 5, jnp.float32).apply(params, x).sum()
    shapes = [
        equation.outvars[0].aval.shape
        for equation, _ in products(jax.make_jaxpr(jax.grad(total, 1))(params, X).jaxpr)
    ]
    assert shapes == [(2, 3, 5), (2, 3, 8), (2, 3, 5), (2, 3, 8)]
    found, expected = jax.grad(total, 1)(params, X), jax.grad(total, (0, 1))(params, X)[1]
    np.testing.assert_array_equal(found, expected)


def test_products_of_the_gradient_are_narrow_too():
    params = Mlp(8, 5, jnp.bfloat16).init(jax.random.key(0), X)
    total = lambda params, x: Mlp(8, 5, jnp.bfloat16).apply(params, x).astype(jnp.float32).sum()
    jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1)))(params, X).jaxpr
    factors = [
        {str(each.aval.dtype) for each in equation.invars} for equation, _ in products(jaxpr)
    ]
    assert factors == [{"bfloat16"}] * 6


def test_the_head_of_a_bfloat16_model_gives_float32_logits():
    # 0.5 + 255 x 2^-9 is exact in float32; a bfloat16 sum would stop growing near 0.5.
    x = jnp.asarray([[1.0] + [2.0**-9] * 255], jnp.bfloat16)
    kernel = jnp.full((256, 1), 1.0).at[0].set(0.5)
    found = Head(1, jnp.bfloat16).apply({"params": {"kernel": kernel}}, x)
    assert found.dtype == jnp.float32
    assert found[0, 0] == 0.5 + 255 * 2.0**-9


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_head_by_word_is_the_head(rows, dtype):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((rows, 6)), jnp.float32)
    kernel = jnp.asarray(draw.standard_normal((6, 13)), dtype)
    by_word = kernel_by_word(kernel)
    assert by_word.shape == (16, 6) and not by_word[13:].any()
    expected = Head(13, dtype).apply({"params": {"kernel": kernel}}, x)
    found = Head(13, dtype, by_word=True).apply({"params": {"kernel": by_word}}, x)
    assert found.shape == (rows, 13) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "contracted", "more"),
    [
        ((1, 1, 8), 1, {}),
        ((1, 1, 2, 4), 2, {"use_bias": False}),
        ((1, 8), 1, {"wide": True}),
        ((1, 1, 8), 1, {"bias_dtype": jnp.bfloat16}),
    ],
)
def test_a_single_row_on_gpus_is_the_first_of_several(shape, contracted, more, monkeypatch):
    """The branch of GPUs, taken here, gives what the plain product gives."""
    dense = Dense((5,), jnp.bfloat16, contracted=contracted, **more)
    x = jnp.asarray(RNG.standard_normal(shape), jnp.bfloat16)
    params = dense.init(jax.random.key(0), x)
    expected, seen = dense.apply(params, x), []

    def on_gpus(*operands, cuda, default):
        seen.append(jax.make_jaxpr(cuda)(*operands).jaxpr)
        return cuda(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_gpus)
    found = dense.apply(params, x)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)
    rows = [equation.outvars[0].aval.shape[0] for equation, _ in products(seen[0])]
    assert rows == [8]


def test_a_wide_product_of_one_row_names_its_algorithm(monkeypatch):
    """Else XLA for GPUs makes a float32 copy of a large kernel, for each token."""
    monkeypatch.setattr(dense_module, "_SMALL", 0)
    branches = []
    monkeypatch.setattr(
        jax.lax,
        "platform_dependent",
        lambda *operands, cuda, default: branches.append(cuda) or default(*operands),
    )
    x, params = narrow(1, 8), {"kernel": narrow(8, 5), "bias": narrow(5)}
    for wide in (False, True):
        Dense((5,), jnp.bfloat16, wide=wide, bias_dtype=jnp.bfloat16).apply({"params": params}, x)
    assert [each.keywords["precision"].name for each in branches] == ["BF16_BF16_F32"]
    Dense((5,), jnp.bfloat16, wide=True).apply({"params": params}, narrow(2, 8))
    assert len(branches) == 1  # several rows need nothing
