"""Rematerialisation changes memory and FLOPs, but no result."""

import jax
import numpy as np
import pytest

from jax_instructblip.models import flops
from jax_instructblip.models.layers import REMAT, Scan, Scans
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.state import partition
from tests.helpers.numerics import random_params
from tests.helpers.tiny import make_batch, tiny_variant

TOWERS = ("vision", "qformer", "llm")


def gradient_of(variant, remat, towers=TOWERS):
    """The function that takes the gradient of trained weights, its layers computed again so."""
    scans = Scans(**{tower: Scan(remat) for tower in towers})
    objective = LanguageObjective(VisionLanguageModel(variant, scans=scans))

    def loss(trainable, frozen, batch, rng):
        return objective({**frozen, **trainable}, batch, rng, objective.totals(batch))

    return jax.value_and_grad(loss, has_aux=True)


def shapes_of(variant, trainable=("qformer",), **sizes):
    chosen, frozen = partition(param_shapes(variant), trainable)
    batch = jax.eval_shape(lambda: make_batch(variant, **sizes))
    return chosen, frozen, batch, jax.eval_shape(lambda: jax.random.key(0))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gradients_are_the_same(kind):
    """With dropout on: the same is dropped the second time."""
    variant = tiny_variant(kind, **{"qformer.dropout": 0.3, "llm.dropout": 0.3})
    chosen, frozen = partition(random_params(variant), ("vision", "qformer"))
    batch, found = make_batch(variant), {}
    for remat in REMAT:
        take = jax.jit(gradient_of(variant, remat))
        (loss, _), gradient = take(chosen, frozen, batch, jax.random.key(0))
        found[remat] = float(loss), jax.tree.map(np.asarray, gradient)
    loss, gradient = found.pop("none")
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for again, ours in found.values():
        assert again == pytest.approx(loss, rel=1e-6)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True):
            assert np.abs(a - b).max() < 1e-6 * largest


@pytest.mark.full
def test_memory_shrinks():
    variant = tiny_variant("llama", **{"llm.layers": 24, "qformer.layers": 12})
    shapes = shapes_of(variant, rows=8, text=40)
    kept = {}
    for remat in REMAT:
        program = jax.jit(gradient_of(variant, remat)).lower(*shapes)
        memory = program.compile().memory_analysis()
        kept[remat] = memory.temp_size_in_bytes
    assert kept["full"] < 0.7 * kept["dots"] and kept["dots"] < 0.8 * kept["none"], kept


@pytest.mark.parametrize("name", ["instructblip-flan-t5-xl", "instructblip-vicuna-7b"])
def test_what_is_computed_again(name):
    variant = get_variant(name)
    shapes = shapes_of(variant, rows=2, text=11, answer=10)
    count = lambda remat, *towers: flops.counted(gradient_of(variant, remat, towers), *shapes)[0]
    none = count("none", *TOWERS)
    # A frozen tower before all that is trained has no backward pass to compute anything for.
    assert count("full", "vision") == none
    assert count("full", "llm") > 1.1 * none
    # Products with weights are nearly all of the work, and "dots" keeps those.
    assert none < count("dots", "qformer", "llm") < 1.05 * none
    again = {remat: count(remat, "qformer") - none for remat in ("full", "dots")}
    assert 0 < again["dots"] < 0.15 * again["full"], again


def test_a_trained_vision_tower_is_computed_again():
    variant = tiny_variant("llama")
    shapes = shapes_of(variant, ("vision", "qformer"))
    count = lambda remat: flops.counted(gradient_of(variant, remat, ["vision"]), *shapes)[0]
    assert count("full") > count("none")
