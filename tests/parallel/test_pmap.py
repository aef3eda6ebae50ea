"""Steps under pmap are the steps under jit."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jax_instructblip.parallel import pmap
from jax_instructblip.parallel.mesh import AXES, make_mesh
from tests.helpers.multi_device import in_a_process

TOLERANCE = 1e-5  # of losses near 4 and weights near 1, in float32


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        pytest.param("llama", "pmap in parts", marks=pytest.mark.full),
        pytest.param("t5", "parts", marks=pytest.mark.full),
    ],
)
def test_ten_steps_do_not_depend_on_the_road(kind, other):
    """The other is a batch worked on in two parts, with every layer computed twice."""
    (found,) = in_a_process(f"roads {kind}")
    assert set(found) == {"pmap", other}
    for road, (losses, weights) in found.items():
        assert losses < TOLERANCE and weights < TOLERANCE, road


def test_one_device_is_enough():
    step = lambda state, frozen, batch, rng: (
        state + jax.lax.psum((frozen * batch["x"]).sum(), pmap.AXIS),
        {"rows": np.float32(batch["x"].shape[0])},
    )
    compiled = pmap.compile_step(step, make_mesh(devices=jax.devices()[:1]))
    state = jax.numpy.float32(1)
    state, metrics = compiled(state, np.float32(2), {"x": np.arange(4.0)}, jax.random.key(0))
    assert (state, metrics["rows"]) == (13, 4)


@pytest.mark.parametrize("sizes", [(1, 2, 1), (4, 1, 2)], ids=str)
def test_refuses_a_mesh_that_splits_weights(sizes):
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(ValueError, match="every device holds them all: leave fsdp and tensor at 1"):
        pmap.check(mesh)
