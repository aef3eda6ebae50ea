"""An exported run: stock transformers gives the answers that the run itself gives."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jax_instructblip
from configs import common
from jax_instructblip import checkpoint
from jax_instructblip.__main__ import main
from jax_instructblip.inference.loading import read_params, read_source
from jax_instructblip.training import loop
from tests.helpers.tiny import write_data
from tests.parity.test_generation import NEW, PROMPTS, SIDE, answers_of_transformers

FORGED = {"t5": "instructblip-flan-t5-xl", "llama": "instructblip-vicuna-7b"}


@pytest.fixture(scope="module", params=FORGED)
def run(request, forge, tmp_path_factory):
    """A run of a few steps over a converted folder."""
    folder = tmp_path_factory.mktemp("tuned")
    assert main(["convert", str(forge(FORGED[request.param])), "--out", str(folder / "base")]) == 0
    config = common.get_config()
    with config.unlocked():
        config.data.sources = {"colors": common.source(str(write_data(folder / "data")))}
    fields = {
        "workdir": str(folder / "run"),
        "model.checkpoint": str(folder / "base"),
        "model.qformer_dropout": 0.05,
        "model.dtype": "float32",
        "model.frozen_dtype": "float32",
        "data.batch_size": 4,
        "data.threads": 1,
        "train.steps": 2,
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_steps": 1,
    }
    config.update_from_flattened_dict(fields)
    return Path(loop.run(config))


def leaves(path):
    return checkpoint.flatten(read_params(read_source(path), lambda path, leaf: leaf))


def test_transformers_answers_as_the_run_and_all_roads_lead_back(run, tmp_path):
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    blip = jax_instructblip.load(run, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in PROMPTS]
    found = blip.generate(images, PROMPTS, max_new_tokens=NEW, batch_size=len(PROMPTS))
    tokens = [list(answer.tokens) for answer in found]
    assert len(tokens) == 20
    assert answers_of_transformers(tmp_path / "hf", images, blip.variant.llm) == tokens

    expected, base = leaves(run), leaves(run.parent / "base")
    changed = {path.partition("/")[0] for path in base if (base[path] != expected[path]).any()}
    assert changed == {"qformer"}  # the run has learnt something
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    blip.save(tmp_path / "saved")
    shutil.rmtree(run.parent / "base")  # what was written needs nothing else
    for name in ("hf", "merged", "saved"):
        again = leaves(tmp_path / name)
        assert again.keys() == expected.keys()
        for path, leaf in expected.items():
            assert again[path].tobytes() == leaf.tobytes(), (name, path)
        found = read_source(tmp_path / name)
        assert found.variant == blip.variant and found.variant.qformer.dropout == 0.05
