import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jax_instructblip.parallel.mesh import batch_sharding, local_rows, make_mesh, replicated
from tests.helpers.interpreter import run_python


def test_has_all_axes_and_they_are_auto():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": len(jax.devices()), "fsdp": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    "sizes", [{"tensor": 3}, {"data": -1, "fsdp": -1}, {"data": 0}, {"data": 2, "fsdp": 2}]
)
def test_refuses_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="mesh {"):
        make_mesh(**sizes)


def test_one_device_holds_all_rows():
    mesh = make_mesh()
    assert local_rows(batch_sharding(mesh), 4).tolist() == [0, 1, 2, 3]
    assert replicated(mesh).is_fully_replicated


EIGHT = """
import numpy as np
from jax_instructblip.data.loader import put
from jax_instructblip.parallel.mesh import batch_sharding, local_rows, make_mesh

for sizes in ({}, {"data": 2, "fsdp": -1, "tensor": 2}, {"data": 1, "tensor": -1}):
    mesh = make_mesh(**sizes)
    sharding = batch_sharding(mesh)
    rows = local_rows(sharding, 8)
    assert rows.tolist() == list(range(8)), rows
    batch = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3)}
    made = put(batch, sharding, rows, 8)["tokens"]
    assert (np.asarray(made) == batch["tokens"]).all()
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    assert made.addressable_shards[0].data.shape == (8 // split, 3)
    try:
        local_rows(sharding, 9)
    except ValueError as error:
        assert split > 1 and f"make it a multiple of {split}" in str(error)
    else:
        assert split == 1
"""


def test_eight_devices():
    run_python(EIGHT, devices=8)


def test_rows_are_those_of_the_devices():
    sharding = batch_sharding(make_mesh())
    np.testing.assert_array_equal(local_rows(sharding, 6), np.arange(6))
