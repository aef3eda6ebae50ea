"""Chooses the devices that answer: those of each process alone, or of all processes together."""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_instructblip.models import quantise as quantisation
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vlm import param_shapes
from jax_instructblip.parallel import rules
from jax_instructblip.parallel.mesh import make_mesh


def choose_mesh(
    variant: Variant, dtype: Any, *, fsdp: int = 1, tensor: int = 1, quantise: str | None = None
) -> Mesh | None:
    """Returns the mesh on which the model answers; None if there is only one device.

    The weights, of `dtype` (a dtype or its name) or quantised ("int8" or "int4"), are split over
    `fsdp` x `tensor` devices. If this number divides that of a process's devices, each process
    has its own copy of the model; otherwise one model spans all processes.

    Raises:
      ValueError: the devices cannot be divided like this, or the weights exceed their memory.
    """
    split, local = fsdp * tensor, jax.local_device_count()
    if min(fsdp, tensor) < 1:
        raise ValueError(f"--fsdp {fsdp} --tensor {tensor}: expected at least 1")
    if jax.device_count() == 1 and split == 1:
        check_memory(variant, dtype, None, quantise)
        return None
    devices = jax.local_devices() if local % split == 0 else jax.devices()
    mesh = make_mesh(fsdp=fsdp, tensor=tensor, devices=devices)
    check_memory(variant, dtype, mesh, quantise)
    return mesh


def check_memory(
    variant: Variant, dtype: Any, mesh: Mesh | None, quantise: str | None = None
) -> None:
    """Raises a ValueError if a device's share of the weights exceeds its memory.

    `mesh` is the result of `choose_mesh`; the other arguments are as there.
    """
    like = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype)
    shapes = jax.tree.map(like, param_shapes(variant))
    if quantise is not None:
        shapes = quantisation.shapes(shapes, quantise)
    placed = None if mesh is None else jax.tree.leaves(rules.shardings(shapes, mesh))
    leaves = jax.tree.leaves(shapes)
    needed = 0
    for number, leaf in enumerate(leaves):
        part = leaf.shape if placed is None else placed[number].shard_shape(leaf.shape)
        needed += math.prod(part) * leaf.dtype.itemsize
    memory = device_memory()
    if memory and needed > memory:
        raise ValueError(
            f"the weights take {needed / 1e9:.1f} GB of each device in {jnp.dtype(dtype)}, and it "
            f"has {memory / 1e9:.1f} GB: split them with --tensor or --fsdp (over the devices of "
            f"all processes, of which there are {jax.device_count()}, if need be)"
        )


def device_memory() -> int:
    """Returns the bytes of memory of one local device; 0 if unknown. CPU devices share the RAM."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":  # all CPU devices share the machine's memory
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages // jax.local_device_count()
    stats = device.memory_stats() or {}
    return int(stats.get("bytes_limit", 0))
