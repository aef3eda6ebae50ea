"""A run that trains the image tower as well, on larger images: BLIP-2's fine-tuning in small."""

import numpy as np
import pytest

import jax_instructblip
from jax_instructblip import checkpoint
from jax_instructblip.conversion.positions import resize_positions
from jax_instructblip.inference.loading import read_params, read_source
from jax_instructblip.training.metrics import read_metrics
from tests.helpers.tiny import QUESTION, compile_cache, write_base, write_data
from tests.training.test_loop import make_config, manifests, run

DECAY, RATE = 0.25, 1e-3
FIELDS = {
    "model.image_size": 42,
    "model.trainable": ("vision", "qformer"),
    "model.llm_dropout": 0.0,
    "model.remat.vision": "full",
    "optimizer.vision_layer_decay": DECAY,
    "optimizer.schedule": "staircase",
    "optimizer.epoch_steps": 2,
    "optimizer.warmup_learning_rate": RATE,
    "optimizer.learning_rate": RATE,
    "optimizer.weight_decay": 0.0,
    "data.augment": False,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    with compile_cache(folder / "programs"):
        yield write_base(folder / "base", "opt"), write_data(folder / "data")


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Four steps, saved after each."""
    fields = FIELDS | {"checkpoints.every": 1, "checkpoints.keep": 4}
    return run(make_config(files, tmp_path_factory.mktemp("vision") / "run", **fields))


def leaves(path):
    return checkpoint.flatten(read_params(read_source(path), lambda path, leaf: leaf))


def test_layers_move_by_their_rates_and_frozen_weights_stay(files, whole, capsys):
    """Adam's first step is the rate itself wherever the gradient is not tiny."""
    before, after = leaves(files[0]), leaves(whole / "checkpoints" / "1")
    before["vision/pos_embed"] = resize_positions(before["vision/pos_embed"], 3)
    moved = {path: np.abs(after[path] - before[path]) for path in before}
    assert all(not change.any() for path, change in moved.items() if path.startswith("llm/"))
    median = lambda path: np.median(moved[path]) / RATE
    kernel = moved["vision/layers/mlp/out/kernel"]
    assert np.median(kernel[1]) / RATE == pytest.approx(DECAY, rel=0.02)
    assert np.median(kernel[0]) / RATE == pytest.approx(DECAY**2, rel=0.02)
    for name in ("cls", "pos_embed", "patch_embed/kernel"):
        assert median(f"vision/{name}") == pytest.approx(DECAY**3, rel=0.02), name
    assert median("qformer/projection/kernel") == pytest.approx(1, rel=0.02)
    last = leaves(whole)
    llm = [path for path in before if path.startswith("llm/")]
    assert llm and all(last[path].tobytes() == before[path].tobytes() for path in llm)


def test_the_rate_falls_by_epochs(whole):
    rates = [line["learning_rate"] for line in read_metrics(whole) if "loss" in line]
    assert rates == pytest.approx([RATE, RATE, RATE / 2, RATE / 2], rel=1e-5)


def test_two_steps_and_two_more_are_four(files, whole, tmp_path, capsys):
    run(make_config(files, tmp_path / "parts", **FIELDS | {"train.steps": 2}))
    assert "images of 42 pixels a side, the base is of 28" in capsys.readouterr().err
    parts = run(make_config(files, tmp_path / "parts", **FIELDS))
    assert manifests(parts, 4) == manifests(whole, 4)


def test_a_run_answers_and_is_merged(whole, tmp_path):
    blip = jax_instructblip.load(whole)
    assert blip.variant.vision.image_size == 42
    image = np.full((30, 30, 3), (220, 30, 30), np.uint8)
    (answer,) = blip.generate([image], [QUESTION], max_new_tokens=4)
    jax_instructblip.merge(whole, tmp_path / "merged")
    merged = jax_instructblip.load(tmp_path / "merged")
    assert merged.generate([image], [QUESTION], max_new_tokens=4) == [answer]


def test_an_image_size_that_does_not_fit_is_said_before_weights_are_read(files, tmp_path):
    fields = FIELDS | {"model.image_size": 43}
    with pytest.raises(ValueError, match=r"config\.model: .*image_size 43 is no multiple of patch"):
        run(make_config(files, tmp_path / "run", **fields))
