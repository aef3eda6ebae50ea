import types

import ml_dtypes
import numpy as np
import pytest

from jax_instructblip.conversion.token_rows import Sum, TokenRows, WithMeanRows, with_mean_rows


def tensor(array):
    return types.SimpleNamespace(
        file="file", shape=array.shape, dtype=array.dtype, read=lambda: array
    )


def test_added_rows_are_the_mean():
    array = np.array([[1, 2], [3, 6]], np.float32)
    np.testing.assert_array_equal(with_mean_rows(array, 4)[2:], [[2, 4], [2, 4]])
    np.testing.assert_array_equal(with_mean_rows(array, 3, axis=1)[:, 2], [1.5, 4.5])
    assert with_mean_rows(array, 1) is array
    more = WithMeanRows(tensor(array), 3)
    assert more.shape == (3, 2) and more.nbytes == 24 and more.file == "file"
    np.testing.assert_array_equal(more.read(), [[1, 2], [3, 6], [2, 4]])


def test_the_last_rows_come_from_elsewhere():
    array, rows = np.ones((2, 2), np.float32), np.full((1, 2), 5, np.float16)
    found = TokenRows(tensor(array), 4, tensor(rows))
    assert found.dtype == np.float32 and found.shape == (4, 2)
    np.testing.assert_array_equal(found.read(), [[1, 1], [1, 1], [1, 1], [5, 5]])
    np.testing.assert_array_equal(array, 1)


@pytest.mark.parametrize("dtype", ["float16", "float32", ml_dtypes.bfloat16])
def test_a_sum_is_rounded_to_the_deltas_dtype(dtype):
    rng = np.random.default_rng(0)
    delta = rng.normal(size=(5, 3)).astype(dtype)
    base = rng.normal(size=(3, 3)).astype(np.float32)
    found = Sum(tensor(delta), tensor(base))
    rounded = base.astype(dtype).astype(np.float64)
    expected = (delta[:3].astype(np.float64) + rounded).astype(dtype)
    assert found.read().dtype == delta.dtype and found.shape == (5, 3)
    np.testing.assert_array_equal(found.read()[:3], expected)
    np.testing.assert_array_equal(found.read()[3:], delta[3:])


def test_pieces_and_infinities():
    delta, base = np.ones((4,), np.float16), np.full((4,), 1e6, np.float32)
    found = Sum(tensor(delta), tensor(base))
    assert np.isinf(found.read(1, 2)).tolist() == [True, True]  # a warning of the converter
