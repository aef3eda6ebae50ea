import ml_dtypes
import numpy as np
import pytest

from jax_instructblip.conversion import transforms
from jax_instructblip.conversion.transforms import (
    attention_bias,
    attention_in,
    attention_out,
    identity,
    linear,
    patches,
)

D, N, K, M = 6, 3, 4, 5
CASES = {
    "identity": (identity, (M, D), lambda x, i: x[i], (M, D)),
    "linear": (linear, (M, D), lambda x, i: x[i[1], i[0]], (D, M)),
    "patches": (patches, (D, 3, 2, 2), lambda x, i: x[i[3], i[2], i[0], i[1]], (2, 2, 3, D)),
    "attention_in": (
        attention_in(N),
        (N * K, D),
        lambda x, i: x[i[1] * K + i[2], i[0]],
        (D, N, K),
    ),
    "attention_bias": (attention_bias(N), (N * K,), lambda x, i: x[i[0] * K + i[1]], (N, K)),
    "attention_out": (
        attention_out(N),
        (D, N * K),
        lambda x, i: x[i[2], i[0] * K + i[1]],
        (N, K, D),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_element_goes_where_it_belongs_and_back(name):
    transform, shape, at, ours = CASES[name]
    source = np.arange(np.prod(shape)).reshape(shape)
    found = transform.forward(source)
    assert found.shape == ours == transform.shape(shape)
    assert transform.source_shape(ours) == shape
    for index in np.ndindex(*ours):
        assert found[index] == at(source, index)
    np.testing.assert_array_equal(transform.backward(found), source)


@pytest.mark.parametrize("name", CASES)
def test_no_transform_copies(name):
    transform, shape, _, _ = CASES[name]
    source = np.zeros(shape, np.float32)
    assert np.shares_memory(transform.forward(source), source)


def test_heads_agree_with_the_attention_they_are_for():
    rng = np.random.default_rng(0)
    x, out = rng.normal(size=(2, D)), rng.normal(size=(2, N * K))
    weight, bias, back = (
        rng.normal(size=(N * K, D)),
        rng.normal(size=N * K),
        rng.normal(size=(D, N * K)),
    )
    split = (x @ weight.T + bias).reshape(2, N, K)
    kernel, shift = attention_in(N).forward(weight), attention_bias(N).forward(bias)
    np.testing.assert_allclose(np.einsum("BD,DNK->BNK", x, kernel) + shift, split)
    merged = np.einsum("BNK,NKD->BD", out.reshape(2, N, K), attention_out(N).forward(back))
    np.testing.assert_allclose(merged, out @ back.T)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_banded_copy_is_a_copy(name, dtype, monkeypatch):
    monkeypatch.setattr(transforms, "BAND_BYTES", 16)
    transform, shape, _, ours = CASES[name]
    rng = np.random.default_rng(0)
    width = np.dtype(dtype).itemsize
    source = rng.integers(0, 256, (*shape, width), dtype=np.uint8).view(dtype)[..., 0]
    target = np.zeros(ours, dtype)
    transforms.copy(target, transform.forward(source))
    wanted = np.ascontiguousarray(transform.forward(source)).view(f"u{width}")
    np.testing.assert_array_equal(target.view(f"u{width}"), wanted)


def test_matrix_transforms_refuse_other_ranks():
    with pytest.raises(ValueError, match="found 3 axes, expected the two of a matrix"):
        linear.shape((2, 3, 4))
