"""The train step under `jax.pmap`, the alternative to `jax.jit` over a mesh.

Every device holds all weights and optimizer moments and runs its own rows of the batch; losses,
token counts and gradients are summed over devices before anything is divided. Between two steps all
arrays are placed as under `jax.jit` on a mesh with as many `data` devices. So checkpoints,
validation and loaders see no difference, and a run can resume in either mode.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"  # name of the mapped axis, for collectives

Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def compile_step(step: Step, mesh: Mesh) -> Step:
    """Compiles `step(state, frozen, batch, rng)` with `jax.pmap`; donates the old state's buffers.

    `step` is called with the rows `[B / n, ...]` of each of the mesh's n devices and must sum over
    the axis `AXIS`. The compiled function takes whole batches `[B, ...]`, placed as by
    `data/loader.py`.
    """
    check(mesh)
    devices = list(mesh.devices.flat)
    # State and weights are not mapped over: they are equal on all devices, also after the step.
    axes = (None, None, 0, None)
    mapped = jax.pmap(step, AXIS, in_axes=axes, out_axes=None, devices=devices, donate_argnums=0)
    rows = NamedSharding(Mesh(mesh.devices.flatten(), (AXIS,)), PartitionSpec(AXIS))
    count = len(devices)

    @functools.partial(jax.jit, out_shardings=rows)
    def split(batch: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)

    return lambda state, frozen, batch, rng: mapped(state, frozen, split(batch), rng)


def check(mesh: Mesh) -> None:
    """Raises a ValueError if pmap cannot use a mesh: one that splits weights or spans processes."""
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
