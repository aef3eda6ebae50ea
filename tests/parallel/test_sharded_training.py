"""Ten steps on meshes of eight devices are those of one device."""

import concurrent.futures

import pytest

from tests.helpers.multi_device import STEP_MESHES, in_a_process

KINDS = tuple(STEP_MESHES)
TOLERANCE = 1e-5  # of losses near 4 and weights near 1, in float32


@pytest.fixture(scope="module")
def meshes():
    """The answers for each kind of model, from two processes at once: most of it is compiling."""
    with concurrent.futures.ThreadPoolExecutor(len(KINDS)) as pool:
        found = pool.map(in_a_process, [f"meshes {kind}" for kind in KINDS])
        return {kind: answer for kind, (answer,) in zip(KINDS, found, strict=True)}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [(kind, sizes) for kind in KINDS for sizes in STEP_MESHES[kind]],
    ids=str,
)
def test_steps_do_not_depend_on_the_mesh(meshes, kind, sizes):
    losses, weights = meshes[kind]["differences"][str(sizes)]
    assert losses < TOLERANCE and weights < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_change_something(meshes, kind):
    assert meshes[kind]["moved"] > 100 * TOLERANCE
    assert len(set(meshes[kind]["losses"])) == 10
