"""Compiled training steps and answers: their recorded facts, and facts that always hold.

Facts are recorded for each version of jaxlib and of libtpu: `python -m tests.helpers.programs cpu
--record` does it again, and prints what changed.
"""

import importlib.util
import json
import re

import pytest

from jax_instructblip.planning.topology import has_cuda
from tests.helpers.interpreter import run_module
from tests.helpers.programs import KINDS, differences, recorded_at, versions

BACKENDS = [
    "cpu",
    pytest.param(
        "v5e",
        marks=[
            pytest.mark.full,
            pytest.mark.skipif(
                importlib.util.find_spec("libtpu") is None,
                reason="needs libtpu: pip install -e .[tpu]",
            ),
        ],
    ),
    pytest.param(
        "h200",
        marks=[
            pytest.mark.full,
            pytest.mark.skipif(
                not has_cuda(), reason="needs the CUDA compiler: pip install -e .[gpu]"
            ),
        ],
    ),
]


@pytest.fixture(scope="module", params=BACKENDS)
def compiled(request):
    """A backend, and what `tests.helpers.programs` finds out about its programs."""
    printed = run_module("tests.helpers.programs", request.param, devices=8)
    return request.param, json.loads(printed.splitlines()[-1])


def test_programs_are_the_recorded_ones(compiled):
    backend, found = compiled
    path = recorded_at(backend)
    if not path.is_file():
        pytest.skip(f"nothing is recorded in {path.name}")
    recorded = json.loads(path.read_text())
    if recorded["versions"] != versions(backend):
        pytest.skip(f"recorded with {recorded['versions']}, here is {versions(backend)}")
    assert list(differences(found["programs"], recorded["programs"])) == []


def test_products_are_those_of_the_count_by_hand(compiled):
    _, found = compiled
    for name, floor in found["floors"].items():
        assert 1.0 <= found["programs"][name]["flops"] / floor <= 1.05, name


def test_the_only_loop_of_unknown_length_is_that_over_tokens(compiled):
    """The number of new tokens is known only when an answer ends."""
    _, found = compiled
    for name, each in found["programs"].items():
        assert each["loops of unknown length"] == ("decode" in name), name


def test_programs_of_one_device_move_nothing(compiled):
    _, found = compiled
    for name, each in found["programs"].items():
        kinds = {collective.partition(" ")[0] for collective in each["collectives"]}
        split = name.endswith(("-train", "-split"))
        assert ({"all-reduce", "all-gather"} <= kinds) if split else not kinds, name


def test_a_loop_over_tokens_copies_no_weights(compiled):
    _, found = compiled
    for kind in KINDS:
        copied = found["programs"][f"{kind}-decode"]["copied in the loop"]
        # Vectors (norms, biases) become wide on the way into a kernel.
        assert [each for each in copied if re.search("kernel|embedding", each)] == []


def test_no_narrow_weight_becomes_a_float32_one(compiled):
    _, found = compiled
    assert {name: each for name, each in found["widened"].items() if each} == {}


def test_arguments_are_what_real_arrays_take(compiled):
    backend, found = compiled
    if backend != "cpu":
        pytest.skip("arrays can be made on a CPU alone")
    for mesh, sizes in found["held"].items():
        assert sizes["shapes"] == pytest.approx(sizes["live"], rel=0.02), mesh
    arguments = found["programs"]["t5-train"]["bytes"]["arguments"]
    assert arguments == pytest.approx(found["held"]["2x2x2"]["live"], rel=0.02)
    meshes = [tuple(each) for each in found["meshes"]]
    assert meshes[0] == (8, 1, 1) and (2, 2, 2) in meshes
    assert (1, 1, 8) not in meshes  # four heads


def test_llavas_second_stage_is_split_with_its_moments(compiled):
    """Weights, gradients and moments of the language model are counted, and lie in parts."""
    backend, found = compiled
    if backend != "cpu":
        pytest.skip("planned for a CPU alone")
    found = found["llava"]
    assert 1.0 <= found["ratio"] <= 1.05 and found["fits"]
    assert found["state"] < 0.45 * found["whole"]  # a quarter, and what is small or looked up
    assert found["flags"] and not any("qformer" in flag for flag in found["flags"])


def test_differences_are_named():
    recorded = {"a": {"flops": 100, "bytes": {"read": 1000, "written": 5}, "collectives": {"x": 1}}}
    near = {"a": {"flops": 100, "bytes": {"read": 1009, "written": 5}, "collectives": {"x": 1}}}
    assert list(differences(near, recorded)) == []
    far = {"a": {"flops": 101, "bytes": {"read": 1011, "written": 5}, "collectives": {"y": 1}}}
    assert list(differences(far, recorded)) == [
        "a/bytes/read: recorded 1000, now 1011",
        "a/collectives/x: recorded 1, now None",
        "a/collectives/y: recorded None, now 1",
        "a/flops: recorded 100, now 101",
    ]
