"""The device mesh, and the shardings that do not depend on the rules for parameters."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_instructblip.models.layers import BATCH_AXES

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of `devices` (None: all) with the three axes `data`, `fsdp` and `tensor`.

    One size may be -1 and is then inferred from the others. The axes are `Auto`, because
    `jax.make_mesh` by default makes them `Explicit`, where a linen Dense over a sharded axis
    raises.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ValueError(f"mesh {sizes}: sizes are at least 1, and one of them may be -1")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {sizes} does not use the {len(devices)} devices there are: expected sizes whose "
            f"product is {len(devices)}"
        )
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # sizes that split one direction of a TPU torus over two axes
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)


def is_split(mesh: Mesh) -> bool:
    """True if a device, or a process, may hold only a part of the weights."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 or mesh.is_multi_process


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding by which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits an array's first axis, the batch, over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
    """The sorted indices of the rows, of a batch of `rows`, that this process's devices hold.

    `sharding` is that of `batch_sharding`. Several processes may hold the same rows: devices that
    differ only in `tensor` do. A ValueError if the rows cannot be split evenly.
    """
    parts = math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES)
    if rows % parts:
        raise ValueError(
            f"a batch of {rows} cannot be split evenly over data x fsdp = {parts} devices; "
            f"make it a multiple of {parts}"
        )
    slices = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in slices]))
