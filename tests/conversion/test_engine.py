import types

import ml_dtypes
import numpy as np
import pytest

from jax_instructblip.conversion import engine
from jax_instructblip.conversion.engine import Drop, Rule, Zeros, make_plan
from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.conversion.transforms import attention_bias, identity, linear

BF16 = ml_dtypes.bfloat16


class Held:
    """Stands for a tensor of a file."""

    def __init__(self, array):
        self.array = np.asarray(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def read(self, part=0, parts=1):
        return np.array(np.split(self.array, parts)[part])


def shape(*size):
    return types.SimpleNamespace(shape=size)


RULES = [
    Rule("top.weight", "top/kernel", linear),
    Rule("layers.{i}.weight", "layers/kernel", linear, range(2)),
    Rule("layers.{i}.qv.bias", "layers/query", attention_bias(2), range(2), (0, 3)),
    Zeros("layers.{i}.qv.bias", "it has no key", (1, 3), range(2)),
    Rule("layers.{i}.qv.bias", "layers/value", attention_bias(2), range(2), (2, 3)),
    Drop("layers.{i}.buffer", "a buffer"),
    Drop("alias", "top.weight by another name", "top.weight"),
]
EXPECTED = {
    "top/kernel": shape(3, 2),
    "layers/kernel": shape(2, 4, 3),
    "layers/query": shape(2, 2, 2),
    "layers/value": shape(2, 2, 2),
}


def source():
    rng = np.random.default_rng(0)
    state = {"top.weight": rng.normal(size=(2, 3)).astype(BF16)}
    for i in range(2):
        state[f"layers.{i}.weight"] = rng.normal(size=(3, 4)).astype(np.float32)
        bias = rng.normal(size=12).astype(np.float32)
        bias[4:8] = 0
        state[f"layers.{i}.qv.bias"] = bias
        state[f"layers.{i}.buffer"] = np.arange(3)
    return state


def plan(state, rules=RULES, expected=EXPECTED):
    return make_plan(rules, {key: Held(value) for key, value in state.items()}, expected, "no")


def failures(state, rules=RULES, expected=EXPECTED):
    with pytest.raises(ConversionError) as error:
        plan(state, rules, expected)
    assert str(error.value).startswith(f"no ({len(error.value.failures)}):")
    return error.value.failures


def test_closed_ledger_makes_every_leaf():
    state = source()
    state["alias"] = state["top.weight"].copy()
    made = plan(state)
    leaves = dict(made)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        path: each.shape for path, each in EXPECTED.items()
    }
    assert leaves["top/kernel"].dtype == BF16
    np.testing.assert_array_equal(leaves["top/kernel"], state["top.weight"].T)
    for i in range(2):
        np.testing.assert_array_equal(leaves["layers/kernel"][i], state[f"layers.{i}.weight"].T)
        bias = state[f"layers.{i}.qv.bias"]
        np.testing.assert_array_equal(leaves["layers/query"][i].reshape(-1), bias[:4])
        np.testing.assert_array_equal(leaves["layers/value"][i].reshape(-1), bias[8:])
    assert made.nbytes == sum(leaf.nbytes for leaf in leaves.values())
    assert made.dropped == {
        "layers.0.buffer": "a buffer",
        "layers.1.buffer": "a buffer",
        "alias": "top.weight by another name",
    }


def test_everything_wrong_is_reported_together():
    state = source()
    del state["top.weight"], state["layers.1.buffer"]
    state["layers.0.weight"] = np.zeros((3, 5), np.float32)
    state["layers.1.qv.bias"][5] = 0.25
    state["layers.2.weight"] = np.zeros((3, 4), np.float32)
    state["stray"] = np.zeros((7,), np.float32)
    assert failures(state) == [
        "layers.0.weight: for layers/kernel: expected shape [3, 4], found [3, 5]",
        "layers.1.qv.bias: elements 4 to 7 must be zero, found up to 0.25: it has no key",
        "layers.2.weight: unexpected: no rule uses it, shape [3, 4]",
        "stray: unexpected: no rule uses it, shape [7]",
        "top.weight: missing: top/kernel needs it, shape [2, 3]",
    ]


def test_layers_with_the_same_failure_share_a_line():
    state = source()
    for i in range(2):
        del state[f"layers.{i}.weight"]
        state[f"blocks.{i}.layer.{i}.x"] = np.zeros(3, np.float32)
    lines = failures(state)
    assert "layers.{0,1}.weight: missing: layers/kernel needs it, shape [3, 4]" in lines
    assert "blocks.0.layer.0.x: unexpected: no rule uses it, shape [3]" in lines  # no full grid
    assert "blocks.1.layer.1.x: unexpected: no rule uses it, shape [3]" in lines


def test_nan_is_not_zero():
    state = source()
    state["layers.0.qv.bias"][4] = np.nan
    assert "must be zero" in failures(state)[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_told_by_their_bits(dtype, value, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK", 4)
    largest = np.finfo(np.float16).max if dtype == np.float16 else 3e38
    weight = np.full((2, 3), largest).astype(dtype)
    assert engine.is_finite(weight)
    weight[1, 2] = value
    assert not engine.is_finite(weight)


def test_leaf_without_rule_and_rule_without_leaf():
    expected = {**EXPECTED, "layers/extra": shape(3)}
    del expected["top/kernel"]
    lines = failures(source(), expected=expected)
    assert lines == [
        "layers/extra: no rule fills this leaf of shape [3]",
        "top/kernel: the network has no such leaf (for top.weight)",
    ]


def test_leaf_filled_twice():
    rules = [*RULES, Rule("layers.{i}.weight", "layers/kernel", linear, range(2))]
    assert failures(source(), rules) == [
        "layers/kernel: filled twice, the second time from layers.{i}.weight"
    ]


def test_part_that_no_rule_takes():
    lines = failures(source(), [rule for rule in RULES if not isinstance(rule, Zeros)])
    assert lines == ["layers.{0,1}.qv.bias: only its parts [(0, 3), (2, 3)] are used"]


def test_layers_of_different_dtypes():
    state = source()
    state["layers.1.weight"] = state["layers.1.weight"].astype(np.float16)
    (line,) = failures(state)
    assert line.startswith("layers/kernel: its layers have different dtypes")
    assert "float32: layers.0.weight" in line and "float16: layers.1.weight" in line


def test_quantised_weights():
    state = source()
    state["top.weight"] = state["top.weight"].astype(np.int8)
    assert "expected float32, float16 or bfloat16, found int8" in failures(state)[0]


def test_alias_that_differs():
    state = source()
    state["alias"] = state["top.weight"] + np.asarray(1, BF16)
    assert failures(state) == ["alias: differs from top.weight, though top.weight by another name"]


def test_wrong_number_of_layers():
    lines = failures(source(), expected={**EXPECTED, "layers/kernel": shape(3, 4, 3)})
    assert "layers/kernel: [3, 4, 3] expected, 2 layers in the rule" in lines


def test_one_tensor_may_fill_two_leaves():
    rules = [*RULES, Rule("top.weight", "head/kernel", identity)]
    made = dict(plan(source(), rules, {**EXPECTED, "head/kernel": shape(2, 3)}))
    np.testing.assert_array_equal(made["head/kernel"], made["top/kernel"].T)
