"""Whole runs on eight devices give the same results on any mesh, and under jit and pmap."""

import numpy as np
import pytest

from tests.helpers.multi_device import in_a_process

pytestmark = pytest.mark.full  # minutes; steps are compared in the tests beside
TOLERANCE = 1e-5  # of losses near 5 and weights near 1, in float32


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    (found,) = in_a_process(f"runs {tmp_path_factory.mktemp('runs')}")
    return found


@pytest.mark.parametrize("road", ["pmap, then jit", "jit, then pmap", "split"])
def test_a_run_is_the_same_along_every_road(runs, road):
    """Checkpoints go from one road to the other; "split" is a mesh of 2 x 2 x 2."""
    whole, found = runs["jit"], runs[road]
    assert len(found["losses"]) == 4
    np.testing.assert_allclose(found["losses"], whole["losses"], atol=TOLERANCE)
    assert found["difference"] < TOLERANCE
    # Validated before the first step and after the last, the answers' log-probabilities.
    np.testing.assert_allclose(found["scores"][0], whole["scores"][0], atol=TOLERANCE)
    np.testing.assert_allclose(found["scores"][-1], whole["scores"][-1], atol=TOLERANCE)
    assert abs(whole["scores"][0] - whole["scores"][-1]) > 100 * TOLERANCE
