"""A whole run of BLIP-2 with OPT: no instruction for the Q-Former, one text, samples in one row."""

import numpy as np
import pytest

import jax_instructblip
from jax_instructblip.training.metrics import read_metrics
from tests.helpers.tiny import QUESTION, compile_cache, write_base, write_data
from tests.training.test_loop import make_config, run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opt")
    return write_base(folder / "base", "opt"), write_data(folder / "data")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    with compile_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.mark.parametrize("shared", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_run_learns_and_its_model_answers(files, tmp_path, shared):
    fields = {"data.samples_per_row": shared, "model.llm_dropout": 0.0}
    whole = run(make_config(files, tmp_path / "whole", **{"train.steps": 20, **fields}))
    losses = [line["loss"] for line in read_metrics(whole) if "loss" in line]
    assert np.mean(losses[-4:]) < 0.8 * losses[0]
    blip = jax_instructblip.load(whole)
    assert blip.variant.kind == "blip2" and blip.text.qformer is None
    image = np.full((30, 30, 3), (220, 30, 30), np.uint8)
    (answer,) = blip.generate([image], [QUESTION], max_new_tokens=6, num_beams=2)
    assert answer.text == blip.text.decode(answer.tokens)
    jax_instructblip.merge(whole, tmp_path / "merged")
    merged = jax_instructblip.load(tmp_path / "merged")
    assert merged.generate([image], [QUESTION], max_new_tokens=6, num_beams=2) == [answer]
