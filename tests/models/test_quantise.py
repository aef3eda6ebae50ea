"""Kernels in int8 and int4: which, how they are rounded, and that models compute with them."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.checkpoint import trees
from jax_instructblip.models import quantise
from jax_instructblip.models.dense import Dense, quantised_product
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from tests.helpers.numerics import random_params
from tests.helpers.quantised import quantised
from tests.helpers.tiny import make_batch, tiny_variant

FORMS = ("int8", "int4")
# Path, shape without layers, and the axes that a product sums over.
KERNELS = (
    ("llm/layers/mlp/gate/kernel", (256, 6), 1),
    ("llm/layers/mlp/out/kernel", (9, 5), 1),  # of odd length: a byte for each weight
    ("vision/layers/attention/query/kernel", (12, 2, 3), 1),
    ("vision/layers/attention/out/kernel", (3, 4, 5), 2),
)


def weights(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_hand(kernel, summed, form):
    """Weights as they are after rounding, one channel or group after the other."""
    found, most = np.empty_like(kernel), {"int8": 127, "int4": 7}[form]
    for channel in itertools.product(*map(range, kernel.shape[summed:])):
        own = kernel[(..., *channel)]
        if form == "int8":
            groups = [tuple(slice(None) for _ in range(summed))]
        else:
            last = own.shape[-1]
            size = max(n for n in range(1, min(128, last) + 1) if last % n == 0)
            outer = itertools.product(*map(range, own.shape[:-1]))
            starts = range(0, last, size)
            groups = [(*o, slice(s, s + size)) for o, s in itertools.product(outer, starts)]
        for group in groups:
            step = np.abs(own[group]).max() / most
            found[(*group, *channel)] = np.round(own[group] / step) * step
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("path", "shape", "summed"), KERNELS)
def test_a_kernel_is_rounded_to_whole_numbers(path, shape, summed, form):
    kernel = weights(shape)
    found = quantise.quantise(path, kernel, form)
    assert found["q"].dtype == quantise.DTYPES[form] and found["scale"].dtype == np.float32
    wide = quantise.expand(jnp.asarray(found["q"]), jnp.asarray(found["scale"]), shape, summed)
    np.testing.assert_allclose(wide, by_hand(kernel, summed, form), rtol=1e-5, atol=1e-6)
    # Layers of a stack are rounded one by one.
    other = quantise.quantise(path, weights(shape, 1), form)
    stack = quantise.quantise(path, np.stack([kernel, weights(shape, 1)]), form)
    for name in ("q", "scale"):
        np.testing.assert_array_equal(stack[name], np.stack([found[name], other[name]]))


def test_the_usual_library_reads_the_same_weights():
    qwix = pytest.importorskip("qwix")
    path, shape, summed = KERNELS[0]
    kernel = weights(shape)
    for form, axes in (("int8", {}), ("int4", {0: 128})):
        own = quantise.quantise(path, kernel, form)
        wide = quantise.expand(jnp.asarray(own["q"]), jnp.asarray(own["scale"]), shape, summed)
        theirs = qwix.quantize(jnp.asarray(kernel), form, channelwise_axes=(1,), tiled_axes=axes)
        assert own["scale"].shape == theirs.scale.shape
        # Its largest weight stands at 127.5 or 7.5, ours at 127 or 7.
        bound = {"int8": 127.5 / 127, "int4": 7.5 / 7}[form]
        np.testing.assert_allclose(own["scale"], theirs.scale * bound, rtol=1e-6)
        whole = jnp.rint(wide / jnp.repeat(own["scale"], shape[0] // len(own["scale"]), 0))
        same = qwix.QArray(whole.astype(form), jnp.asarray(own["scale"]), qtype=jnp.dtype(form))
        np.testing.assert_allclose(qwix.dequantize(same), wide, rtol=1e-6)
        off = lambda each: float(jnp.abs(each - kernel).mean())
        assert off(wide) < 1.1 * off(qwix.dequantize(theirs))


def test_zero_channels_stay_zero_and_damaged_weights_are_named():
    kernel = weights((8, 3))
    kernel[:, 1] = 0
    found = quantise.quantise("llm/layers/mlp/in/kernel", kernel, "int8")
    assert not found["q"][:, 1].any() and np.isfinite(found["scale"]).all()
    kernel[2, 2] = np.inf
    with pytest.raises(ValueError, match="llm/layers/mlp/in/kernel has weights that are not fin"):
        quantise.quantise("llm/layers/mlp/in/kernel", kernel, "int4")
    with pytest.raises(ValueError, match="mlp/out/kernel has weights that are not fin"):
        quantise.quantise("llm/decoder/layers/mlp/out/kernel", kernel, "int8")


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 4, 3)])
@pytest.mark.parametrize("layers", ["llm/layers", "vision/layers", "llm/decoder/layers"])
def test_a_kernel_without_weights_is_named(layers, shape, form):
    path = f"{layers}/mlp/out/kernel"
    message = rf"{path} has the shape \{shape}, which holds no weights"
    with pytest.raises(ValueError, match=message.replace(")", r"\)")):
        quantise.quantise(path, np.zeros(shape, np.float32), form)
    tree = jax.ShapeDtypeStruct(shape, np.float32)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    with pytest.raises(ValueError, match=message.replace(")", r"\)")):
        quantise.shapes(tree, form)


@pytest.mark.parametrize(
    ("last", "groups"),
    [(1408, 11), (88, 1), (24, 1), (258, 3), (131, 1), (257, 1), (262, 2), (2 * 131 * 4, 8)],
)
def test_a_group_has_enough_weights_to_be_small(last, groups):
    """No axis makes int4 larger than int8: groups that divide it are of 32 weights or more."""
    kernel = weights((last, 3))
    four, eight = (
        quantise.quantise("llm/layers/mlp/in/kernel", kernel, form) for form in FORMS[::-1]
    )
    assert four["scale"].shape == (groups, 3)
    size = lambda parts: sum(each.nbytes for each in parts.values())
    assert size(four) <= size(eight)
    wide = quantise.expand(jnp.asarray(four["q"]), jnp.asarray(four["scale"]), kernel.shape, 1)
    half = np.repeat(four["scale"], last // groups, axis=0) / 2
    assert (np.abs(wide - kernel) <= half * 1.001).all()
    named = {
        "llm": {"layers": {"mlp": {"in": {"kernel": jax.ShapeDtypeStruct((2, last, 3), "f4")}}}}
    }
    shapes = quantise.shapes(named, "int4")
    found = shapes["llm"]["layers"]["mlp"]["in"]["kernel"]
    assert {name: leaf.shape[1:] for name, leaf in found.items()} == {
        name: leaf.shape for name, leaf in four.items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_small_weights_of_large_inputs_are_kept(form):
    """Rows of T5's output kernels that are tiny beside others do not become zeros."""
    kernel, rows = weights((16, 5)), np.exp2(-np.arange(16.0, dtype=np.float32))[:, None]
    kernel[0, 0] = 4.0  # the largest of all, with and without the factors of rows
    path = "llm/encoder/layers/mlp/out/kernel"
    found = jax.tree.map(jnp.asarray, quantise.quantise(path, kernel * rows, form))
    wide = quantise.expand(found["q"], found["scale"], (16, 5), 1) * found["input_scale"]
    step = {"int8": 127, "int4": 7}[form]
    bound = 1.5 * np.abs(kernel * rows).max(axis=1, keepdims=True) / step
    assert (np.abs(wide - kernel * rows) <= bound).all()
    # Without scales of inputs they do.
    other = quantise.quantise("llm/layers/mlp/out/kernel", kernel * rows, form)
    plain = quantise.expand(jnp.asarray(other["q"]), jnp.asarray(other["scale"]), (16, 5), 1)
    assert np.asarray(wide)[-1].any() and not np.asarray(plain)[-1].any()
    # And inputs as large as the weights are small meet them.
    x, dense = jnp.asarray(1 / rows.T), Dense((5,), jnp.float32, use_bias=False)
    product = dense.apply({"params": {"kernel": found}}, x)
    np.testing.assert_allclose(product, np.asarray(x) @ np.asarray(wide), rtol=1e-4)


def test_what_is_quantised():
    def chosen(variant):
        paths = trees.flatten(param_shapes(variant))
        return {path for path in paths if quantise.is_quantised(path)}

    attention = [f"attention/{name}" for name in ("query", "key", "value", "out")]
    expected = {f"vision/layers/{name}/kernel" for name in (*attention, "mlp/in", "mlp/out")}
    llama = {f"llm/layers/{name}/kernel" for name in (*attention, "mlp/in", "mlp/out", "mlp/gate")}
    assert chosen(tiny_variant("llama")) == expected | llama
    t5 = {
        f"llm/{stack}/layers/{name}/kernel"
        for stack in ("encoder", "decoder")
        for name in (*attention, "mlp/in", "mlp/gate", "mlp/out")
    }
    t5 |= {f"llm/decoder/layers/cross_{name}/kernel" for name in attention}
    assert chosen(tiny_variant("t5")) == expected | t5
    # And layers that decode, where each is a tree of its own.
    assert quantise.is_quantised("llm/layers/3/mlp/in/kernel")


def test_towers_that_cannot_be_quantised_are_refused_by_name():
    variant = tiny_variant("llama")
    assert quantise.frozen_towers(variant, ("qformer",)) == ("vision", "llm")
    assert quantise.frozen_towers(variant, ("qformer", "llm")) == ("vision",)
    with pytest.raises(ValueError, match="vision: it is trained, .* no gradient; llm: it is train"):
        quantise.frozen_towers(variant, ("vision", "qformer", "llm"))
    with pytest.raises(ValueError, match="qformer: it is none of vision, llm"):
        quantise.check_towers(("llm", "qformer"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("path", "shape", "summed", "bias"), [(*each, bias) for each in KERNELS for bias in (0, 1)]
)
def test_a_product_is_that_with_the_rounded_weights(path, shape, summed, bias, form):
    features = shape[summed:]
    dense = Dense(features, jnp.float32, bool(bias), contracted=summed, wide=True)
    stored = jax.tree.map(jnp.asarray, quantise.quantise(path, weights(shape), form))
    rounded = quantise.expand(stored["q"], stored["scale"], shape, summed)
    rest = {"bias": jnp.asarray(weights(features, 2))} if bias else {}
    x, pull = jnp.asarray(weights((4, *shape[:summed]), 3)), jnp.asarray(weights((4, *features), 4))

    def loss(x, kernel):
        product: Any = dense.apply({"params": {"kernel": kernel, **rest}}, x)
        return (product * pull).sum()

    for take in (loss, jax.grad(loss)):
        np.testing.assert_allclose(take(x, stored), take(x, rounded), rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="a quantised kernel has the shape .*, expected"):
        dense.apply({"params": {"kernel": {**stored, "q": stored["q"][:1]}, **rest}}, x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("path", "shape", "summed"),
    [
        *KERNELS,
        ("llm/layers/mlp/in/kernel", (131, 4), 1),  # a prime number of inputs
        ("llm/layers/mlp/in/kernel", (512, 7), 1),
        ("llm/layers/attention/out/kernel", (3, 256, 5), 2),
    ],
)
def test_a_row_is_multiplied_by_the_whole_numbers(path, shape, summed, form):
    """The product of GPUs for a single row; elsewhere `Dense` has one of wide weights."""
    kernel, x = weights(shape), jnp.asarray(weights((1, 1, *shape[:summed]), 3))
    stored = jax.tree.map(jnp.asarray, quantise.quantise(path, kernel, form))
    found = quantise.row_product(x, stored["q"], stored["scale"], shape, summed)
    wide = np.asarray(quantise.expand(stored["q"], stored["scale"], shape, summed), np.float64)
    expected = np.tensordot(np.asarray(x, np.float64), wide, summed)[0, 0]
    assert found.shape == shape[summed:] and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(wide).sum() ** 0.5)


def test_a_byte_of_two_groups_leaves_a_row_to_the_product_of_many():
    shape, path = (262, 8), "llm/layers/mlp/in/kernel"  # two groups of 131
    stored = jax.tree.map(jnp.asarray, quantise.quantise(path, weights(shape), "int4"))
    assert stored["scale"].shape == (2, 8)
    assert not quantise.has_row_product(stored["q"], stored["scale"], shape, 1)
    x = jnp.asarray(weights((2, 262), 3))
    both = quantised_product(x, stored["q"], stored["scale"], shape, 1)
    alone = quantised_product(x[:1], stored["q"], stored["scale"], shape, 1)
    np.testing.assert_allclose(alone, both[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "form"), [("llama", "int8"), ("t5", "int8"), ("opt", "int8"), ("llama", "int4")]
)
def test_a_model_computes_with_the_rounded_weights(kind, form):
    variant = tiny_variant(kind)
    plain = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), random_params(variant))
    params, rounded = quantised(plain, form)
    expected = quantise.shapes(param_shapes(variant), form)
    like = lambda leaf: (leaf.shape, str(leaf.dtype))
    assert jax.tree.map(like, params) == jax.tree.map(like, expected)
    assert quantise.form_of(params) == form and quantise.form_of(rounded) is None
    batch = make_batch(variant)
    apply = jax.jit(VisionLanguageModel(variant).apply)
    found, wanted = apply({"params": params}, batch), apply({"params": rounded}, batch)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize(
    "name",
    ["instructblip-vicuna-7b", "instructblip-flan-t5-xl", "instructblip-flan-t5-xxl", "llava-7b"],
)
def test_bytes_of_released_models(name):
    variant = get_variant(name)
    half = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    shapes = jax.tree.map(half, param_shapes(variant))
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    assert size(quantise.shapes(shapes, "int8")) < 0.55 * size(shapes)
