"""Greedy answers against the original code's recorded ones and against transformers."""

import jax
import numpy as np
import pytest

from jax_instructblip.inference.decode import generate_tokens
from jax_instructblip.models.instructblip import InstructBlip
from tests.parity import golden

# The recorded `min_length` 8 counts T5's start id, and the first id of transformers 4.33.2 that the
# decoder-only models never embed: 7 new tokens.
SETTINGS = {
    "greedy": {},
    "greedy_rep1.5": {"repetition_penalty": 1.5},
    "greedy_min8": {"min_new_tokens": 7},
}
CASES = ("instruct_t5", "instruct_vicuna")


@pytest.fixture(scope="module", params=CASES)
def case(request, shared):
    return request.param


@pytest.fixture(scope="module")
def model(case):
    return InstructBlip(golden.variant(case)), golden.params(case)


def assert_same_answers(model, made, recorded):
    """`recorded` starts with the id before the first new one, and is padded with 0."""
    eos = model.variant.llm.eos_id
    for tokens, length, row in zip(made["tokens"], made["lengths"], recorded[:, 1:], strict=True):
        row = list(row)
        row = row[: row.index(eos) + 1] if eos in row else row
        assert list(tokens[0][: length[0]]) == row


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tag", ["generate", "generate_video"])
def test_greedy_answers_are_those_of_the_original_code(case, model, tag, setting):
    recorded = golden.outputs(case).get(f"{tag}/{setting}/ids")
    if recorded is None:
        pytest.skip(f"{case} has no recorded {tag}/{setting}")
    count = 12 if case == "instruct_t5" else 11  # max_length 12 counts that first id too
    made = generate_tokens(
        *model,
        golden.batch(case, tag),
        jax.random.split(jax.random.key(0), len(recorded)),
        max_new_tokens=count,
        **SETTINGS[setting],
    )
    assert_same_answers(model[0], jax.tree.map(np.asarray, made), recorded)
