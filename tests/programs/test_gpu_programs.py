"""Programs that answer on a GPU, at the widths of released models: what a new token reads."""

import json

import pytest

from benchmarks.gpu_programs import ALL, BEAMS, PATH, TOPOLOGY, measure, with_layers
from jax_instructblip.models.released import VARIANTS
from jax_instructblip.models.variants import QUANTISED
from jax_instructblip.planning.topology import has_cuda, read_topology

LAYOUTS = ("loaded", *QUANTISED)
needs_cuda = pytest.mark.skipif(
    not has_cuda(), reason="needs the CUDA compiler: pip install -e .[gpu]"
)


def test_recorded_programs_read_weights_and_cache_once():
    programs = json.loads(PATH.read_text())["programs"]
    greedy = {f"{model}, greedy, batch 1, {layout}" for model in ALL for layout in LAYOUTS}
    assert greedy <= set(programs)
    for name, row in programs.items():
        if not name.endswith("stacked"):
            assert row["copies"] == [], name
            assert "ranking" in name or 0.99 <= row["read_over_needed"] <= 1.1, name


@pytest.mark.full
@needs_cuda
@pytest.mark.parametrize("model", ALL[:2])
@pytest.mark.parametrize(
    ("kind", "form"), [("greedy", "int8"), ("greedy", "int4"), (f"{BEAMS} beams", "int8")]
)
def test_whole_numbers_are_read_once_and_never_made_wide_in_memory(model, kind, form):
    found = measure(with_layers(VARIANTS[model], 1), kind, 1, form, read_topology(TOPOLOGY))
    assert found["copies"] == []
    assert found["read"] <= 1.06 * found["needed"]
    assert found["written"] <= 0.05 * found["needed"]


@pytest.mark.full
@needs_cuda
@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("kind", ["greedy", f"{BEAMS} beams", "ranking"])
def test_a_layer_is_read_once_and_never_copied(model, kind):
    variant = with_layers(VARIANTS[model], 1)
    found = measure(variant, kind, 1, "loaded", read_topology(TOPOLOGY))
    assert found["copies"] == []
    # A ranking has the activations of all candidates.
    assert found["read"] <= (1.4 if kind == "ranking" else 1.1) * found["needed"]
