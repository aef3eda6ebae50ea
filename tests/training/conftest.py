"""Fixtures of the training tests."""

import jax
import jax.numpy as jnp
import pytest

from jax_instructblip.models.vlm import VisionLanguageModel
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.optimizer import adamw
from jax_instructblip.training.state import create_state, partition
from tests.helpers.numerics import random_params
from tests.helpers.tiny import make_batch, tiny_variant

RATE = 1e-2


@pytest.fixture(scope="session")
def tuning():
    """`tuning("t5")`: settings of a step, the same each time; state, frozen weights, a batch."""
    made = {}

    def make(kind: str, **fields):
        key = kind, tuple(fields.items())
        if key not in made:
            variant = tiny_variant(kind, **fields)
            schedule = lambda _: RATE
            objective = LanguageObjective(VisionLanguageModel(variant))
            settings = dict(objective=objective, optimizer=adamw(schedule), schedule=schedule)
            params = jax.tree.map(
                lambda leaf: jnp.asarray(leaf, jnp.float32), random_params(variant)
            )
            made[key] = settings, *partition(params, ("qformer",)), make_batch(variant)
        settings, chosen, frozen, batch = made[key]
        return settings, create_state(chosen, settings["optimizer"]), frozen, batch

    return make
