import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jax_instructblip.models import layers
from jax_instructblip.models.layers import GatedMlp, LayerNorm, Mlp, RMSNorm
from tests.helpers.numerics import error

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 3, 8), np.float32))
SCALE = {"scale": jnp.asarray(RNG.standard_normal(8, np.float32))}
LEAVES = {**SCALE, "bias": jnp.asarray(RNG.standard_normal(8, np.float32))}


def slow_norm(x, eps, params):
    """A layer norm, or without a bias an RMS norm, in float64."""
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True) if "bias" in params else x
    normal = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)
    return normal * np.asarray(params["scale"]) + np.asarray(params.get("bias", 0))


# The small inputs have a variance near 1e-6: there 1e-5 and 1e-6 differ by a factor, not by noise.
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_layer_norm(eps, size):
    found = LayerNorm(eps).apply({"params": LEAVES}, size * X)
    assert error(found, slow_norm(size * X, eps, LEAVES)) < 1e-6


def test_layer_norm_eps_is_visible_at_low_variance():
    apply = lambda eps: LayerNorm(eps).apply({"params": LEAVES}, 1e-3 * X)
    assert error(apply(1e-5), apply(1e-6)) > 0.1


def test_layer_norm_keeps_its_precision_far_from_zero():
    # One-pass variance (mean of squares minus square of the mean) would lose all digits here.
    found = LayerNorm(1e-6).apply({"params": LEAVES}, X + 3000)
    assert error(found, slow_norm(X + 3000, 1e-6, LEAVES)) < 2e-4


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_rms_norm(size):
    found = RMSNorm(1e-6).apply({"params": SCALE}, size * X)
    assert error(found, slow_norm(size * X, 1e-6, SCALE)) < 1e-6


@pytest.mark.parametrize("norm", [LayerNorm(1e-5), RMSNorm(1e-6)], ids=["layer", "rms"])
@pytest.mark.parametrize("size", [1.0, 1e18])
def test_norms_of_bfloat16_have_float32_statistics(norm, size):
    x = jnp.asarray(size * X, jnp.bfloat16)
    leaves = SCALE if isinstance(norm, RMSNorm) else LEAVES
    found = norm.apply({"params": leaves}, x)
    expected = slow_norm(x, norm.eps, leaves)
    assert found.dtype == jnp.bfloat16
    assert error(found, expected) < 0.01  # roundings to 8 bits


def test_rms_norm_rounds_before_the_scale():
    x = jnp.asarray(X, jnp.bfloat16)
    scale = SCALE["scale"].astype(jnp.bfloat16)
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    expected = normal.astype(jnp.bfloat16) * scale[None, None]
    np.testing.assert_array_equal(RMSNorm(1e-6).apply({"params": {"scale": scale}}, x), expected)


def test_activations():
    x = np.array([-3.0, -1.0, -0.1, 0.0, 0.5, 2.0])
    erf = np.vectorize(math.erf)(x / math.sqrt(2))
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    expected = {
        "gelu": 0.5 * x * (1 + erf),
        "gelu_new": 0.5 * x * (1 + tanh),
        "relu": np.maximum(x, 0),
        "silu": x / (1 + np.exp(-x)),
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
    }
    assert set(expected) == set(layers.ACTIVATIONS)
    for name, values in expected.items():
        np.testing.assert_allclose(layers.ACTIVATIONS[name](jnp.float32(x)), values, atol=1e-6)


def test_mlp():
    kernels = RNG.standard_normal((8, 5)), RNG.standard_normal((5, 8))
    up = {"kernel": kernels[0], "bias": np.ones(5)}
    params = {"in": up, "out": {"kernel": kernels[1], "bias": np.ones(8)}}
    params = jax.tree.map(jnp.float32, params)
    found = Mlp(8, 5, jnp.float32, "relu").apply({"params": params}, X)
    expected = np.maximum(X @ kernels[0] + 1, 0) @ kernels[1] + 1
    assert error(found, expected) < 1e-6


def test_gated_mlp_activates_the_gate():
    gate, up, out = (RNG.standard_normal(shape) for shape in ((8, 5), (8, 5), (5, 8)))
    params = {"gate": {"kernel": gate}, "in": {"kernel": up}, "out": {"kernel": out}}
    params = jax.tree.map(jnp.float32, params)
    found = GatedMlp(8, 5, jnp.float32, "relu").apply({"params": params}, X)
    assert error(found, np.maximum(X @ gate, 0) * (X @ up) @ out) < 1e-6


class Doubling(nn.Module):
    """A layer that counts itself: x -> kernel x + addend, and gives back what it got."""

    @nn.compact
    def __call__(self, x, own, addend):
        kernel = self.param("kernel", nn.initializers.normal(), ())
        return kernel * x + addend + own, x


def test_scan_runs_the_stacked_layers_in_order():
    tower = layers.scan_layers(Doubling, 3, layers.Scan(), call=1)()
    kernel, own = jnp.array([2.0, 3.0, 5.0]), jnp.array([10.0, 20.0, 30.0])
    x, seen = tower.apply({"params": {"kernel": kernel}}, jnp.float32(1), own, jnp.float32(1))
    # 1 -> 2 + 1 + 10 = 13 -> 39 + 1 + 20 = 60 -> 300 + 1 + 30 = 331
    assert x == 331
    np.testing.assert_array_equal(seen, [1, 13, 60])


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.ones((2, 3))
    assert layers.constrain(x) is x


@pytest.mark.parametrize("kind, split", [(AxisType.Auto, True), (AxisType.Explicit, False)])
def test_constrain_splits_the_batch_where_the_mesh_is_automatic(kind, split):
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(layers.constrain)(jnp.ones((2, 3)))
    found = [equation.params for equation in program.eqns]
    assert bool(found) == split
    if split:
        assert found[0]["sharding"].spec == PartitionSpec(layers.BATCH_AXES)


def test_constrain_leaves_a_row_that_all_samples_share():
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        assert not jax.make_jaxpr(layers.constrain)(jnp.ones((1, 3))).eqns
