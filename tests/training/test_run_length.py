"""Steps of epochs, and the warm-up as a share of them."""

import pytest

from configs import common
from jax_instructblip.data.mixture import Mixture, Source
from jax_instructblip.training.config_fields import check_config
from jax_instructblip.training.config_file import change_fields
from jax_instructblip.training.run_length import make_optimizer, with_steps


def mixture(*counts):
    """Sources of so many records."""
    return Mixture([Source(str(n), range(n), "") for n in counts], 0)


@pytest.mark.parametrize(
    ("counts", "epochs", "steps", "warmup"),
    [((595_375,), 1, 4_652, 140), ((157_712,), 3, 14_787, 444), ((3, 4), 0.5, 1, 0)],
)
def test_epochs_are_steps_and_a_share_of_them_the_warm_up(counts, epochs, steps, warmup):
    """Batches and warm-up are rounded up, as in the trainer of the released code."""
    batch = 32 if epochs == 3 else 128
    fields = {"data.batch_size": batch, "train.epochs": epochs, "optimizer.warmup_ratio": 0.03}
    config = change_fields(common.get_config(), fields)
    found = with_steps(config, mixture(*counts))
    assert (found.train.steps, config.train.steps) == (steps, 60_000)
    _, schedule = make_optimizer(found)
    assert schedule(warmup) == pytest.approx(1e-5) and schedule(steps) == pytest.approx(0, abs=1e-9)
    if warmup:
        assert schedule(warmup - 1) < schedule(warmup) > schedule(warmup + 99)
    config.train.epochs = 0
    assert with_steps(config, mixture(*counts)) is config


def test_a_warm_up_longer_than_the_epochs_is_refused():
    fields = {"train.epochs": 1, "optimizer.warmup_steps": 2_000, "train.steps": 10}
    config = change_fields(common.get_config(), fields)
    check_config(config)  # the records are not known yet
    with pytest.raises(ValueError, match="warm-up of 2000 steps in a run of 1"):
        make_optimizer(with_steps(config, mixture(5)))
