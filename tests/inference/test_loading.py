"""Arguments of `load` that cannot be used are refused before weights are read."""

import pytest

import jax_instructblip


@pytest.mark.parametrize("dtype", ["float15", "int32", int, "float64", object(), "bf16"])
def test_a_dtype_that_no_model_computes_in_is_refused_before_weights(dtype):
    with pytest.raises(ValueError, match="dtype is .*, expected one of float32, bfloat16, float16"):
        jax_instructblip.load("nowhere", dtype=dtype)


@pytest.mark.parametrize("path", [None, 5, b"shapes_t5", [], True])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(ValueError, match="the checkpoint is .*, expected text or a Path"):
        jax_instructblip.load(path)
