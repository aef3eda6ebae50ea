"""The second road: the same step under `jax.pmap`, the way many programs for several GPUs run.

Every device holds all weights and moments and runs the program of its own rows; losses, tokens and
gradients are summed over devices before anything is divided. What lies where between two steps is
what the other road leaves on a mesh of as many `data` devices: checkpoints, validation and loaders
see no difference, and a run can go on along either.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"  # of the mapped axis, for collectives

Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def compile_step(step: Step, mesh: Mesh) -> Step:
    """`step(state, frozen, batch, rng)` under `jax.pmap`; it takes the old state's buffers over.

    `step` sees the rows `[B / n, ...]` of one of the mesh's n devices and sums over `AXIS`; the
    result is handed whole batches `[B, ...]`, as `data/loader.py` places them.
    """
    check(mesh)
    devices = list(mesh.devices.flat)
    # State and weights are not mapped over: they are equal on all devices, before and after.
    axes = (None, None, 0, None)
    mapped = jax.pmap(step, AXIS, in_axes=axes, out_axes=None, devices=devices, donate_argnums=0)
    rows = NamedSharding(Mesh(mesh.devices.flatten(), (AXIS,)), PartitionSpec(AXIS))
    count = len(devices)

    @functools.partial(jax.jit, out_shardings=rows)
    def split(batch: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)

    return lambda state, frozen, batch, rng: mapped(state, frozen, split(batch), rng)


def check(mesh: Mesh) -> None:
    """Raises a ValueError where the mesh splits weights, or has devices of other processes."""
    sizes = dict(mesh.shape)
    if mesh.size != sizes["data"]:
        raise ValueError(
            f"the mesh {sizes} splits weights, but under pmap every device holds them all: leave "
            "fsdp and tensor at 1, or take config.parallel.mode=jit"
        )
    if mesh.is_multi_process:
        raise ValueError(
            f"pmap drives the devices of one process, and this run has {jax.process_count()}: take "
            "config.parallel.mode=jit"
        )
