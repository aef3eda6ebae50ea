"""The one constructor of a mesh, and the placements that need no rule."""

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
    """The mesh of all devices with axes `data`, `fsdp` and `tensor`, always all three.

    One of the sizes may be -1: what the others leave. The axes are `Auto`: `jax.make_mesh` alone
    would make them `Explicit`, where a linen Dense over a sharded axis raises.
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
        raise ValueError(f"mesh {sizes} does not use the {len(devices)} devices there are")
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # sizes that cut a direction of a torus of TPUs into two axes
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)


def is_split(mesh: Mesh) -> bool:
    """Tells whether a device, or a process, may hold a part of the weights alone."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 or mesh.is_multi_process


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement by which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The placement that splits the first axis, of samples, over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
    """The numbers of the rows that this process's devices hold of `rows` under `sharding`.

    Devices of several processes may hold the same rows: those that differ in `tensor` alone do.
    """
    parts = math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES)
    if rows % parts:
        raise ValueError(
            f"a batch of {rows} cannot be split evenly over data x fsdp = {parts} devices; "
            f"make it a multiple of {parts}"
        )
    slices = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in slices]))
