import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.conversion.engine import Rule
from jax_instructblip.conversion.lavis import lavis_entries
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.vlm import param_shapes
from jax_instructblip.training.optimizer import (
    adamw,
    decays,
    rate_scales,
    staircase_cosine,
    warmup_cosine,
)
from tests.helpers import golden, golden_blip2

PAPER = dict(start=1e-8, peak=1e-5, end=0.0, warmup_steps=1_000, total_steps=60_000)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-8),
        (1, 1e-8 + 9.99e-9),
        (500, 5.005e-6),
        (1_000, 1e-5),
        (30_500, 5e-6),
        (60_000, 0.0),
        (70_000, 0.0),
    ],
)
def test_cosine(step, rate):
    np.testing.assert_allclose(warmup_cosine(**PAPER)(step), rate, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(
        jax.jit(warmup_cosine(**PAPER))(jnp.int32(step)), rate, rtol=1e-5, atol=1e-12
    )


def lavis(step, max_step=3_000, epochs=20.0, start=1e-8, peak=1e-5, end=0.0, warmup=1_000):
    """The rule of REFERENCE 5.1, written down a second time."""
    epoch = step // max_step
    if epoch == 0:
        return min(peak, start + (peak - start) * step / warmup)
    return end + 0.5 * (peak - end) * (1 + np.cos(np.pi * epoch / epochs))


def test_staircase():
    rate = staircase_cosine(**PAPER, epoch_steps=3_000)
    steps = [0, 1, 999, 1_000, 2_999, 3_000, 5_999, 6_000, 30_000, 59_999]
    expected = [lavis(step) for step in steps]
    np.testing.assert_allclose([rate(step) for step in steps], expected, rtol=1e-5)
    assert rate(2_999) == rate(1_000) and rate(3_000) == rate(5_999) != rate(6_000)


def test_staircase_loses_a_warm_up_longer_than_an_epoch():
    rate = staircase_cosine(**(PAPER | {"warmup_steps": 5_000}), epoch_steps=3_000)
    assert rate(2_999) < 6.1e-6 < 9.9e-6 < rate(3_000)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match="warm-up of 100 steps in a run of 100"):
        warmup_cosine(start=0.0, peak=1.0, end=0.0, warmup_steps=100, total_steps=100)


def test_no_warm_up_starts_at_the_peak():
    rate = warmup_cosine(start=1e-8, peak=1.0, end=0.0, warmup_steps=0, total_steps=10)
    assert rate(0) == 1.0


def test_decay_is_decided_by_name():
    shapes = param_shapes(get_variant("tiny-t5"))
    chosen = jax.tree_util.tree_flatten_with_path(decays(shapes))[0]
    by_name = {}
    for path, decay in chosen:
        by_name.setdefault(path[-1].key, set()).add(decay)
    assert by_name == {
        "kernel": {True},
        "embedding": {True},
        "queries": {True},
        "cls": {True},
        "pos_embed": {True},
        "relative_bias": {True},
        "bias": {False},
        "scale": {False},
    }


def test_an_unknown_name_is_an_error_that_lists_all():
    with pytest.raises(ValueError, match=r"'beta'.*'gamma'"):
        decays({"norm": {"gamma": jnp.ones(2), "beta": jnp.ones(2), "bias": jnp.ones(2)}})


def test_equals_torch():
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    rng = np.random.default_rng(0)
    # Stacked layers: a bias has rank 2 here, so a rule by rank would decay it.
    shapes = {"kernel": (2, 3, 4), "bias": (2, 4), "scale": (2, 3), "queries": (1, 5, 3)}
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(3)
    ]

    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    groups = [
        {"params": [theirs["kernel"], theirs["queries"]], "weight_decay": 0.1},
        {"params": [theirs["bias"], theirs["scale"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    optimizer = adamw(lambda _: 1e-2, weight_decay=0.1)
    params = jax.tree.map(jnp.asarray, start)
    moments = optimizer.init(params)
    for gradient in gradients:
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        reference.step()
        updates, moments = optimizer.update(jax.tree.map(jnp.asarray, gradient), moments, params)
        params = optax.apply_updates(params, updates)
    for name, parameter in theirs.items():
        moved = np.abs(parameter.detach().numpy() - start[name]).max()
        assert moved > 0.02  # three steps of 1e-2: the comparison can fail
        np.testing.assert_allclose(
            params[name], parameter.detach().numpy(), atol=1e-6, err_msg=name
        )


def test_the_groups_of_the_released_code(shared):
    """Its file lists `lr_scale` and weight decay of every tensor of a first stage, decay 0.9."""
    case = golden_blip2.CASE
    listed = json.loads((golden.GOLDEN / case / "optimizer_groups.json").read_text())
    groups = listed["weight_decay_0.05_lr_scale_0.9_unfrozen_vit"]
    expected = {
        name: (group["lr_scale"], group["weight_decay"] > 0)
        for group in groups
        for name in group["params"]
    }
    variant = golden_blip2.variant(case)
    shapes = param_shapes(variant)
    scales = checkpoint.flatten(rate_scales(shapes, 0.9))
    decayed = checkpoint.flatten(decays(shapes))
    compared = 0
    for rule in (each for each in lavis_entries(variant) if isinstance(each, Rule)):
        for layer, key in enumerate(rule.keys):
            if key in expected:
                scale = scales[rule.target]
                found = scale[layer] if np.ndim(scale) else scale
                assert np.squeeze(found) == pytest.approx(expected[key][0], rel=1e-6), key
                assert decayed[rule.target] == expected[key][1], key
                compared += 1
    assert compared > 150


def test_rates_of_stacked_layers():
    """Adam's first update is the rate itself, whatever the gradient: the ratios are seen in it."""
    decay, layers = 0.8, 3
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    params = {
        "vision": {
            "cls": draw(1, 1, 4),
            "pos_embed": draw(1, 5, 4),
            "patch_embed": {"kernel": draw(2, 2, 3, 4), "bias": draw(4)},
            "layers": {"mlp": {"in": {"kernel": draw(layers, 4, 6), "bias": draw(layers, 6)}}},
        },
        "qformer": {"layers": {"kernel": draw(2, 3, 3)}, "queries": draw(1, 2, 3)},
    }
    gradient = jax.tree.map(lambda leaf: jnp.sign(leaf) * (0.1 + jnp.abs(leaf)), params)
    for weight_decay in (0.0, 0.1):
        updates = {}
        for rate in (1.0, decay):
            optimizer = adamw(
                lambda _: 1e-2, weight_decay=weight_decay, vision_layer_decay=rate, eps=1e-12
            )
            state = optimizer.init(params)
            updates[rate], after = jax.jit(optimizer.update)(gradient, state, params)
            assert jax.tree.structure(after) == jax.tree.structure(state)
        ratio = jax.tree.map(lambda a, b: np.asarray(a / b), updates[decay], updates[1.0])
        for layer in range(layers):
            for leaf in jax.tree.leaves(ratio["vision"]["layers"]):
                np.testing.assert_allclose(leaf[layer], decay ** (layers - layer), rtol=1e-5)
        for name in ("cls", "pos_embed", "patch_embed"):
            for leaf in jax.tree.leaves(ratio["vision"][name]):
                np.testing.assert_allclose(leaf, decay ** (layers + 1), rtol=1e-5)
        for leaf in jax.tree.leaves(ratio["qformer"]):
            np.testing.assert_array_equal(leaf, 1.0)
    plain = jax.tree.leaves(updates[1.0]["vision"]["layers"])
    assert all((np.abs(leaf) > 5e-3).all() for leaf in plain)
