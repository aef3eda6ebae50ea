"""Arguments of `load`: those that cannot be used are refused, and weights are quantised."""

import json

import numpy as np
import pytest
from PIL import Image

import jax_instructblip
from benchmarks.quantise import RESULT
from jax_instructblip.inference.loading import read_params, read_source
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.models import quantise
from tests.helpers.quantised import quantised
from tests.helpers.tiny import QUESTION, write_base


@pytest.mark.parametrize("dtype", ["float15", "int32", int, "float64", object(), "bf16"])
def test_a_dtype_that_no_model_computes_in_is_refused_before_weights(dtype):
    with pytest.raises(ValueError, match="dtype is .*, expected one of float32, bfloat16, float16"):
        jax_instructblip.load("nowhere", dtype=dtype)


@pytest.mark.parametrize("path", [None, 5, b"shapes_t5", [], True])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(ValueError, match="the checkpoint is .*, expected text or a Path"):
        jax_instructblip.load(path)


@pytest.mark.parametrize("form", ["int16", 8, True, "bfloat16"])
def test_a_form_of_weights_that_is_none_is_refused(form):
    with pytest.raises(ValueError, match="quantise is .*, expected None or one of int8, int4"):
        jax_instructblip.load("shapes_llama", quantise=form)


@pytest.mark.parametrize(("kind", "form"), [("llama", "int8"), ("t5", "int4")])
def test_a_quantised_model_answers_with_its_rounded_weights(tmp_path, kind, form):
    """Layers that decode are apart on a CPU; those compared are a stack."""
    base = write_base(tmp_path / "base", kind)
    blip = jax_instructblip.load(base, quantise=form)
    assert quantise.form_of(blip.params) == form and f"float32, {form} weights" in repr(blip)
    params = read_params(read_source(base), lambda path, leaf: leaf)
    _, rounded = quantised(params, form)
    expected = InstructBlipPipeline(blip.variant, rounded, blip.text, silent=True)
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3)).astype(np.uint8)
    answers = [
        each.generate([Image.fromarray(image)], [QUESTION], max_new_tokens=5)[0]
        for each in (blip, expected)
    ]
    assert answers[0].tokens == answers[1].tokens and answers[0].tokens
    np.testing.assert_allclose(answers[0].logprobs, answers[1].logprobs, atol=1e-4)
    # Checkpoints keep the dtype of before.
    with pytest.raises(ValueError, match=f"out is not written: the weights were made {form} when"):
        blip.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_recorded_measurement_keeps_the_promises():
    """int8: nearly always the same token, never an empty answer, half of the bytes."""
    recorded = json.loads(RESULT.read_text())
    for name in ("shapes_llama", "shapes_t5"):
        found = recorded[name]["int8"]
        assert found["top1"] >= 0.99 and found["empty"] == 0 and found["bytes"]["kernels"] < 0.55
    assert all(each["int8"]["all"] <= 0.55 for each in recorded["released"].values())
