"""A step on rows of several samples equals the step on rows of one sample."""

import functools
import json

import jax
import numpy as np
import pytest

from jax_instructblip.data.batch import collate
from jax_instructblip.models.vlm import VisionLanguageModel
from tests.helpers import packing
from tests.helpers.interpreter import run_python

KINDS = ("llama", "t5", "opt")
CLOSE = 1e-5  # of the loss, and of each leaf's gradient
# Of key biases, whose gradients are nothing but rounding: no softmax sees them. Their unit is a
# thousandth of the largest gradient (`packing.differences`).
NOISE = 1e-4
QUICK = (8,)  # samples a row that are tried in every run of the tests


@pytest.fixture(scope="module", autouse=True)
def recorded(shared):
    """The lengths of the mixture's samples are among the shared files."""


def assert_close(found, road=""):
    for name, difference in found.items():
        assert difference < (NOISE if name == "key_bias" else CLOSE), (road, found)


@functools.cache
def expected(kind):
    variant = packing.still(kind)
    return packing.gradients(variant, packing.rows(variant, packing.samples(variant), 1))


@pytest.mark.parametrize(
    "per_row",
    [
        pytest.param(each, marks=() if each in QUICK else pytest.mark.full)
        for each in packing.SHARED[1:]
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_have_the_loss_and_the_gradient_of_plain_ones(kind, per_row):
    variant = packing.still(kind)
    batch = packing.rows(variant, packing.samples(variant), per_row)
    found = packing.differences(packing.gradients(variant, batch), expected(kind))
    assert_close(found)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_on_eight_devices_under_pmap_and_in_parts(kind):
    printed = run_python(f"from tests.helpers import packing; packing.show({kind!r})", devices=8)
    found = json.loads(printed.splitlines()[-1])
    assert len(found) == 4
    for road, differences in found.items():
        assert_close(differences, road)


def test_llavas_second_stage_on_eight_devices_is_that_of_one():
    """Packed rows, weights and moments split, layers computed again; against plain rows."""
    program = "import json; from tests.helpers import packing; "
    printed = run_python(f"{program}print(json.dumps(packing.second_stage()))", devices=8)
    found = json.loads(printed.splitlines()[-1])
    assert len(found) == 2
    for road, differences in found.items():
        assert_close(differences, road)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_who_shares_its_row(kind):
    variant = packing.still(kind)
    params, examples = packing.parameters(variant), packing.samples(variant, 8)
    lengths = {"slots": 2048, "targets": 1024, "images": 8, "qformer_tokens": 256}
    apply = jax.jit(VisionLanguageModel(variant).apply)

    def logits(order):
        batch = collate(
            [examples[number] for number in order],
            visual_tokens=variant.visual_tokens,
            samples_per_row=4,
            lengths=lengths,
            pad_id=variant.llm.pad_id,
        )
        made, count = apply({"params": params}, batch), {}
        for row, numbers in enumerate(np.reshape(order, (-1, 4))):
            start = 0
            for number in numbers:
                length = int((examples[number]["targets"] >= 0).sum())
                count[number] = made[row, start : start + length]
                start += length
        return count

    one, other = logits(range(8)), logits([7, 2, 5, 0, 3, 4, 1, 6])
    scale = max(np.abs(leaf).max() for leaf in one.values())
    for number, leaf in one.items():
        assert np.abs(leaf - other[number]).max() < 1e-5 * scale, number


def test_what_a_mate_says_would_show():
    """The comparison above sees a mask that lets samples see each other."""
    variant = packing.still("llama")
    batch = packing.rows(variant, packing.samples(variant), 8)
    merged = np.where(batch["segments"] > 0, 1, 0)
    found = packing.gradients(variant, {**batch, "segments": merged})
    assert packing.differences(found, expected("llama"))["loss"] > 100 * CLOSE
