"""Gradient accumulation: a step in parts equals the step on the whole batch."""

import functools

import jax
import numpy as np
import pytest

from configs import common
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.training import setup
from jax_instructblip.training.step import _split, _sums, train_step
from tests.helpers.numerics import error

STILL = {"qformer.dropout": 0.0, "llm.dropout": 0.0}


def compiled(function, **settings):
    return jax.jit(functools.partial(function, **settings))


def test_parts_add_up_to_the_whole(tuning):
    settings, state, frozen, batch = tuning("t5", **STILL)
    counts = [(batch["targets"][part::2] >= 0).sum() for part in (0, 1)]
    assert counts[0] != counts[1]  # so a mean of the parts' means would be another number
    totals = settings["objective"].totals(batch)
    assert totals["tokens"] == sum(counts)
    whole, found = (
        compiled(_sums, objective=settings["objective"], totals=totals, parts=parts)(
            state.params, frozen, batch, jax.random.key(0)
        )
        for parts in (1, 2)
    )
    assert found[0] == pytest.approx(float(whole[0]), rel=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole[2]))
    for ours, theirs in zip(jax.tree.leaves(found[2]), jax.tree.leaves(whole[2]), strict=True):
        assert np.abs(ours - theirs).max() < 1e-6 * largest


def test_a_step_in_parts_is_the_step(tuning):
    settings, state, frozen, batch = tuning("llama", **STILL)
    (_, whole), (_, found) = (
        compiled(train_step, **settings, accumulate=parts)(state, frozen, batch, jax.random.key(0))
        for parts in (1, 4)
    )
    for name, value in whole.items():
        assert error(found[name], value) < 1e-6, name


def test_every_part_draws_its_own_dropout(tuning):
    settings, state, frozen, batch = tuning("llama", **{"qformer.dropout": 0.5})
    key = jax.random.key(0)
    same = {name: np.repeat(rows[:1], 4, axis=0) for name, rows in batch.items()}
    shared = dict(objective=settings["objective"], totals=settings["objective"].totals(same))
    sums = lambda parts: compiled(_sums, **shared, parts=parts)
    total = float(sums(4)(state.params, frozen, same, key)[0])
    one, each = {name: rows[:1] for name, rows in batch.items()}, sums(1)
    losses = [
        float(each(state.params, frozen, one, jax.random.fold_in(key, part))[0])
        for part in range(4)
    ]
    assert len(set(losses)) == 4
    assert total == pytest.approx(sum(losses), rel=1e-6)


def test_every_device_draws_its_own_dropout(tuning):
    """`jax.vmap` has an axis with a name, too: two devices with the same row each."""
    settings, state, frozen, batch = tuning("llama", **{"qformer.dropout": 0.5})
    one = {name: rows[:1] for name, rows in batch.items()}
    same = {name: np.stack([rows, rows]) for name, rows in one.items()}
    step = functools.partial(train_step, **settings, axis_name="devices")
    mapped = jax.vmap(step, (None, None, 0, None), None, axis_name="devices")
    _, metrics = compiled(mapped)(state, frozen, same, jax.random.key(0))
    totals = settings["objective"].totals(same)
    each = compiled(_sums, objective=settings["objective"], totals=totals, parts=1)
    key = jax.random.fold_in(jax.random.key(0), 0)
    losses = [
        float(each(state.params, frozen, one, jax.random.fold_in(key, device))[0])
        for device in range(2)
    ]
    assert losses[0] != losses[1]
    assert metrics["loss"] == pytest.approx(sum(losses), rel=1e-6)
    assert metrics["tokens"] == totals["tokens"]


def test_rows_stay_with_their_devices():
    """Part i has rows i, i + 2, ...: of each device's run of rows an equal share."""
    parts = _split({"x": np.arange(8)}, 2)["x"]
    assert parts.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_refuses_parts_of_unequal_size(tuning):
    with pytest.raises(ValueError, match="4 rows cannot be worked on in 3 equal parts"):
        _split(tuning("llama")[-1], 3)
    config = common.get_config()
    config.data.batch_size, config.train.accumulate = 6, 4
    with pytest.raises(ValueError, match=r"batch_size is 6; .* in 4 parts .* a multiple of 4"):
        setup.read_rows(config, make_mesh(devices=jax.devices()[:1]))
    config.data.batch_size = 8
    rows = setup.read_rows(config, make_mesh(devices=jax.devices()[:1]))
    assert rows.tolist() == list(range(8))


def test_as_many_samples_share_a_row_as_a_device_and_part_have():
    config, mesh = common.get_config(), make_mesh(devices=jax.devices()[:1])
    config.data.batch_size = 24
    for wanted, parts, shared in ((1, 1, 1), (8, 1, 8), (12, 2, 12), (12, 4, 6), (100, 3, 8)):
        config.data.samples_per_row, config.train.accumulate = wanted, parts
        assert setup.read_samples_per_row(config, mesh) == shared
        assert len(setup.read_rows(config, mesh)) == 24 // shared


def test_samples_that_do_not_fill_rows_are_refused():
    config, mesh = common.get_config(), make_mesh(devices=jax.devices()[:1])
    config.data.batch_size, config.data.samples_per_row, config.train.accumulate = 24, 5, 2
    with pytest.raises(
        ValueError, match=r"samples_per_row is 5, .* 12 samples .* 1, 2, 3, 4, 6, 12"
    ):
        setup.read_samples_per_row(config, mesh)
