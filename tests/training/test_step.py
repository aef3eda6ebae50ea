import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.data.spec import example_batch
from jax_instructblip.models import flops
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.optimizer import adamw
from jax_instructblip.training.state import create_state, partition
from jax_instructblip.training.step import compile_step, train_step
from tests.helpers.interpreter import run_python
from tests.helpers.tiny import tiny_variant

KINDS = ("llama", "t5")
STILL = {"qformer.dropout": 0.0, "llm.dropout": 0.0}
_COMPILED = {}


def compiled(settings, **more):
    """The step of these settings, compiled once for all tests."""
    key = id(settings["objective"]), *more.items()
    if key not in _COMPILED:
        step = functools.partial(train_step, **settings, **more)
        _COMPILED[key] = jax.jit(step)
    return _COMPILED[key]


@pytest.mark.parametrize("kind", KINDS)
def test_trains_the_chosen_part_and_leaves_the_rest_alone(tuning, kind):
    settings, state, frozen, batch = tuning(kind)
    before = jax.tree.map(np.array, (state.params, frozen))
    step, losses = compiled(settings), []
    for _ in range(20):
        state, metrics = step(state, frozen, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[1] - 0.1
    assert int(state.step) == 20
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), frozen, before[1]))
    still = [
        jax.tree_util.keystr(path)
        for path, same in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: bool((a == b).all()), state.params, before[0])
        )
        if same
    ]
    # The text branch of the last layer is computed but nobody looks at what comes out of it.
    assert all("text_mlp" in path and "plain" in path for path in still), still


@pytest.mark.parametrize("kind", KINDS)
def test_holds_moments_of_the_trained_leaves_only(tuning, kind):
    _, state, _, _ = tuning(kind)
    sizes = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    counters = 2
    assert sizes(state.optimizer) == 2 * sizes(state.params) + counters
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not any("llm" in path or "vision" in path for path in paths)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
        np.dtype("float32"),
        np.dtype("int32"),
    }


GOLDEN = {  # one step from numpy-drawn weights, without dropout, at learning rate 1e-2
    "llama": {"loss": 4.380545, "gradient_norm": 0.683889, "moved": 0.217806},
    "t5": {"loss": 4.460488, "gradient_norm": 1.109350, "moved": -0.139613},
}


@pytest.mark.parametrize("kind", KINDS)
def test_golden_numbers(tuning, kind):
    settings, state, frozen, batch = tuning(kind, **STILL)
    after, metrics = compiled(settings)(state, frozen, batch, jax.random.key(0))
    # Not all leaves: the gradient of key biases is rounding noise, which Adam makes steps of.
    moved = after.params["qformer"]["projection"]["kernel"]
    moved = moved - state.params["qformer"]["projection"]["kernel"]
    found = {
        "loss": float(metrics["loss"]),
        "gradient_norm": float(metrics["gradient_norm"]),
        "moved": float(moved.sum()),
    }
    assert found == pytest.approx(GOLDEN[kind], rel=1e-4, abs=1e-5)


def traced(kind, function=None, variant=None, trainable=()):
    """FLOPs, shapes of products and analytic FLOPs of a step, or of `function` in its place."""
    variant = variant or tiny_variant(kind)
    rows, text, answer = 3, 11, 10
    batch = jax.eval_shape(lambda: example_batch(variant, rows, text, answer))
    chosen, frozen = partition(param_shapes(variant), (variant.bridge.key, *trainable))
    rate = lambda _: 1e-2
    optimizer = adamw(rate)
    state = jax.eval_shape(lambda tree: create_state(tree, optimizer), chosen)
    objective = LanguageObjective(VisionLanguageModel(variant))
    step = functools.partial(train_step, objective=objective, optimizer=optimizer, schedule=rate)
    function = step if function is None else functools.partial(function, objective)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    found, shapes = flops.counted(function, state, frozen, batch, rng)
    sizes, trains_llm = (rows, text, text, answer), "llm" in trainable
    return found, shapes, flops.analytic(variant, *sizes, trains_llm=trains_llm), frozen


def gradient_of_everything(objective, state, frozen, batch, rng):
    """The gradient of all weights, which the step must not compute and then zero where frozen."""
    totals = objective.totals(batch)
    loss = lambda params: objective(params, batch, rng, totals)[0]
    return jax.grad(loss)({**frozen, **state.params})


def frozen_gradients(shapes, frozen):
    """Shapes of products that a frozen weight's gradient would have, whatever its axes' order."""
    alike = lambda shape: tuple(sorted(size for size in shape if size > 1))
    weights = {
        alike(leaf.shape[1:] if any(k.key == "layers" for k in path) else leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(frozen)
        if path[-1].key == "kernel"
    }
    return [shape for shape in shapes if alike(shape) in weights]


@pytest.mark.parametrize("kind", KINDS)
def test_computes_no_gradient_of_a_frozen_weight(kind):
    found, shapes, expected, frozen = traced(kind)
    assert 0.95 * expected < found <= 1.05 * expected
    assert frozen_gradients(shapes, frozen) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_sees_a_gradient_of_everything(kind):
    found, shapes, expected, frozen = traced(kind, gradient_of_everything)
    assert found > 1.05 * expected
    assert len(frozen_gradients(shapes, frozen)) >= 10


LLAMA3 = {"llm.key_value_heads": 8, "llm.mlp": 14336, "llm.head_size": 160}


@pytest.mark.parametrize(
    ("name", "fields", "trainable"),
    [
        ("instructblip-flan-t5-xl", {}, ()),
        ("instructblip-vicuna-13b", {}, ()),
        ("instructblip-vicuna-7b", LLAMA3, ()),
        ("llava-7b", {}, ()),
        ("llava-1.5-7b", {"llm.tied_head": True}, ()),
        ("llava-1.5-13b", {}, ("llm",)),
    ],
)
def test_full_size_needs_no_more_than_the_analytic_count(name, fields, trainable):
    variant = get_variant(name).replace(**fields)
    found, shapes, expected, frozen = traced("", variant=variant, trainable=trainable)
    assert 0.99 * expected < found <= 1.01 * expected
    if variant.kind == "llava" and "llm" in frozen:
        assert frozen_gradients(shapes, {"llm": frozen["llm"]}) == []


def test_clips_the_gradient_to_a_norm(tuning):
    settings, state, frozen, batch = tuning("llama", **STILL)
    rng = jax.random.key(0)
    _, free = compiled(settings)(state, frozen, batch, rng)
    norm = float(free["gradient_norm"])
    after, metrics = compiled(settings, clip_norm=norm / 4)(state, frozen, batch, rng)
    assert metrics["gradient_norm"] == pytest.approx(norm)  # what it was before
    first = after.optimizer[0].mu  # 0.1 x the gradient after one step
    clipped = np.sqrt(sum(float(jnp.square(leaf).sum()) for leaf in jax.tree.leaves(first)))
    assert clipped == pytest.approx(0.1 * norm / 4, rel=1e-4)


def test_dropout_is_drawn_from_the_key_and_the_step(tuning):
    settings, state, frozen, batch = tuning("t5")
    step = compiled(settings)
    loss = lambda number, seed: float(
        step(state._replace(step=jnp.int32(number)), frozen, batch, jax.random.key(seed))[1]["loss"]
    )
    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(1, 0), loss(0, 1)}) == 3


def test_metrics(tuning):
    settings, state, frozen, batch = tuning("llama")
    parameters = np.sqrt(sum(float(jnp.square(p).sum()) for p in jax.tree.leaves(state.params)))
    _, metrics = compiled(settings)(state, frozen, batch, jax.random.key(0))
    assert metrics["tokens"] == (batch["targets"] >= 0).sum()
    assert metrics["parameter_norm"] == pytest.approx(parameters, rel=1e-5)
    assert metrics["learning_rate"] == pytest.approx(1e-2)
    assert {leaf.dtype for leaf in metrics.values()} == {np.dtype("float32")}


def test_takes_over_the_buffers_of_the_state_and_keeps_the_frozen_ones(tuning):
    settings, state, frozen, batch = tuning("llama")
    step = compile_step(**settings)
    old = state.params["qformer"]["queries"]
    state, _ = step(state, frozen, batch, jax.random.key(0))
    assert old.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    compiled_once = step._cache_size()
    step(state, frozen, batch, jax.random.key(0))
    assert step._cache_size() == compiled_once == 1


def test_narrow_frozen_weights_are_not_widened_ahead_of_the_scan():
    variant = tiny_variant("llama", **{"llm.layers": 12, "llm.mlp": 3000})
    chosen, frozen = partition(param_shapes(variant), ("qformer",))
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), frozen)
    rate = lambda _: 1e-2
    optimizer = adamw(rate)
    state = jax.eval_shape(lambda tree: create_state(tree, optimizer), chosen)
    batch = jax.eval_shape(lambda: example_batch(variant, 1, 4))
    rng = jax.eval_shape(lambda: jax.random.key(0))
    temporary = {}
    for narrow in (False, True):
        step = compile_step(
            objective=LanguageObjective(VisionLanguageModel(variant, jnp.bfloat16)),
            optimizer=optimizer,
            schedule=rate,
            narrow_weights=narrow,
        )
        lowered = step.lower(state, frozen, batch, rng)
        analysis = lowered.compile().memory_analysis()
        temporary[narrow] = analysis.temp_size_in_bytes
    tower = 4 * sum(leaf.size for leaf in jax.tree.leaves(frozen["llm"]["layers"]))
    assert temporary[False] - temporary[True] > 0.8 * tower


def test_imports_without_what_a_bare_machine_lacks():
    absent = ["grain", "ml_collections", "tensorboardX", "tensorflow_datasets", "array_record"]
    code = f"""
import sys
for name in {absent + ["matplotlib", "torch", "tensorflow"]}:
    sys.modules[name] = None
import jax_instructblip.training.step, jax_instructblip.training.checkpoints
"""
    run_python(code)


def test_a_step_without_a_finite_loss_is_skipped_whole(tuning):
    settings, state, frozen, batch = tuning("t5")
    step = compiled(settings, skip_non_finite=True)
    key = jax.random.key(1)
    state, metrics = step(state, frozen, batch, key)
    assert float(metrics["skipped"]) == 0
    before = jax.tree.map(np.array, state)
    spoilt = jax.tree.map(lambda leaf: leaf * jnp.nan, frozen)
    state, metrics = step(state, spoilt, batch, key)
    assert float(metrics["skipped"]) == 1 and not np.isfinite(metrics["loss"])
    assert int(state.step) == 2
    for old, new in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(state[1:]), strict=True):
        if np.issubdtype(old.dtype, np.integer):  # the schedule's place
            assert new == old + 1
        else:
            np.testing.assert_array_equal(new, old)
    after, metrics = step(state, frozen, batch, key)
    assert float(metrics["skipped"]) == 0
    assert not jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after.params, state.params))
    # Without the setting the same batch spoils the weights.
    plain, metrics = compiled(settings)(state, spoilt, batch, key)
    assert "skipped" not in metrics
    assert any(not np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain.params))
