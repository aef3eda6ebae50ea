"""Packing: which samples share a row, how wide the rows are, and how much of them is padding."""

import json

import numpy as np
import pytest

from benchmarks import packing as measured
from configs import paper_flan_t5_xl, paper_flan_t5_xxl, paper_vicuna_7b, paper_vicuna_13b
from jax_instructblip.data.packing import deal, row_lengths
from jax_instructblip.models import flops
from jax_instructblip.planning.job import read_variant

CONFIGS = {
    "vicuna_7b": paper_vicuna_7b,
    "vicuna_13b": paper_vicuna_13b,
    "flan_t5_xl": paper_flan_t5_xl,
    "flan_t5_xxl": paper_flan_t5_xxl,
}
# Least share of positions that are not padding, mean of 200 batches: slots, targets.
REAL = {
    "vicuna_7b": (0.84, 0.0),
    "vicuna_13b": (0.70, 0.0),
    "flan_t5_xl": (0.78, 0.60),
    "flan_t5_xxl": (0.66, 0.35),
}
# Most FLOPs of a sample, as a share of those of rows of one sample.
WORK = {"vicuna_7b": 0.26, "vicuna_13b": 0.28, "flan_t5_xl": 0.41, "flan_t5_xxl": 0.37}


def test_samples_are_dealt_out_evenly_longest_first():
    sizes = [(9, 1), (1, 1), (8, 1), (2, 1), (5, 1), (5, 1)]
    shared = deal(sizes, 3)
    assert sorted(shared.flat) == list(range(6)) and shared.shape == (3, 2)
    assert sorted(sum(sizes[sample][0] for sample in row) for row in shared) == [10, 10, 10]
    long_answers = [(1, 30), (30, 1), (1, 30), (30, 1)]
    rows = deal(long_answers, 2)  # two sizes at once: no row has two of the same kind
    assert max(sum(long_answers[s][k] for s in row) for row in rows for k in (0, 1)) == 31
    assert deal(sizes, 6).tolist() == [[0], [1], [2], [3], [4], [5]]  # alone, all stay in place
    with pytest.raises(ValueError, match="6 samples cannot be dealt out evenly to 4 rows: .* of 4"):
        deal(sizes, 4)


def test_dealing_leaves_little_room_empty():
    rng = np.random.default_rng(0)
    lengths = np.where(
        rng.random(128) < 0.1, rng.integers(150, 400, 128), rng.integers(40, 70, 128)
    )
    shared = deal([(length, 1) for length in lengths], 16)
    widths, in_order = lengths[shared].sum(axis=1), lengths.reshape(16, 8).sum(axis=1)
    assert widths.mean() / widths.max() > 0.85 > in_order.mean() / in_order.max()


def test_rows_are_as_wide_as_the_widest_rounded_up():
    sample = lambda slots, targets, text, images: {
        "slots": slots,
        "targets": targets,
        "qformer_tokens": text,
        "images": images,
    }
    sizes = [sample(30, 3, 5, 1), sample(20, 2, 33, 3), sample(40, 60, 7, 0), sample(9, 8, 1, 1)]
    found = row_lengths(sizes, np.array([[0, 1], [2, 3]]), text_limit=128)
    assert found == {"images": 4, "qformer_tokens": 64, "slots": 64, "targets": 128}
    found = row_lengths(sizes[2:3], np.array([[0]]), text_limit=20)
    assert found == {"images": 1, "qformer_tokens": 20, "slots": 64, "targets": 64}


@pytest.fixture(scope="module", params=CONFIGS)
def training(request):
    """Name, config and variant of one of the paper's trainings, and 200 batches of it."""
    config = CONFIGS[request.param].get_config()
    variant = read_variant(config)[1]
    sizes = measured.draw(request.param, config.data.batch_size, variant.visual_tokens, 200)
    return request.param, config, variant, list(sizes)


def test_the_papers_rows_are_hardly_padded(training):
    name, config, variant, drawn = training
    shared, limits = config.data.samples_per_row, config.text
    packed = [measured.pack(sizes, shared, limits.qformer_limit) for sizes in drawn]
    real = np.mean([measured.shares(*each) for each in zip(drawn, packed, strict=True)], axis=0)
    assert (real >= REAL[name]).all()
    assert len({tuple(shape.items()) for shape in packed}) <= 20  # programs
    # What the config tells the planner is what these batches have.
    widest = [max(shape[axis] for shape in packed) for axis in ("slots", "targets")]
    assert [config.plan.row_slots, config.plan.row_targets] == widest
    means = np.mean([list(size.values()) for sizes in drawn for size in sizes], axis=0)
    np.testing.assert_allclose(config.plan.sample, means, atol=0.06)
    # FLOPs by hand; on the jaxpr of each shape they are counted by `benchmarks/packing.py`.
    answers = limits.answer_limit - (not variant.llm.encoder_decoder)
    tokens = limits.prompt_limit + (0 if variant.llm.encoder_decoder else answers)
    lengths = {"qformer_tokens": limits.qformer_limit, "tokens": tokens, "targets": answers}
    padded = [measured.pad(s, lengths, variant.visual_tokens, (64,)) for s in drawn]

    def work(shape):
        rows = {"row_slots": shape["slots"], "row_targets": shape["targets"]}
        text, samples = shape["qformer_tokens"], config.data.batch_size
        per_row = samples // shape["rows"]
        return flops.analytic(variant, samples, text, 0, 0, samples_per_row=per_row, **rows)

    ratio = sum(map(work, packed)) / sum(map(work, padded))
    assert ratio <= WORK[name]


def test_the_recorded_measurement_keeps_the_promises():
    recorded = json.loads(measured.RESULT.read_text())
    for name, most in WORK.items():
        found, config = recorded[name], CONFIGS[name].get_config()
        assert found["steps"] == 200 and found["flops_ratio"] <= most
        assert found["samples_per_row"] == config.data.samples_per_row
        assert found["plan"]["row"] == [config.plan.row_slots, config.plan.row_targets]
