"""Jobs to plan for small models, and a plan's bytes beside those of live arrays."""

import dataclasses
from typing import Any

import jax

from configs import common
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning import advice, plan
from jax_instructblip.planning.job import Job, read_job
from jax_instructblip.planning.topology import Topology
from tests.helpers import packing
from tests.helpers.multi_device import Setting

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2))


def job_of(variant, step="train", rows=16, dtype="float32", **fields) -> Job:
    """The job of a config, changed by `fields`, for batches of `tests/helpers/tiny.py`."""
    config = common.get_config()
    config.model.frozen_dtype = config.model.dtype = dtype
    config.data.batch_size = config.validation.batch_size = rows
    config.validation.max_new_tokens = 4
    config.text.qformer_limit, config.text.prompt_limit, config.text.answer_limit = 9, 9, 6
    config.update_from_flattened_dict(fields)
    return read_job(config, variant, step)


def held(topology: Topology) -> dict[str, dict[str, int]]:
    """Bytes on the first of eight devices, by mesh: of a plan's shapes, and of live arrays."""
    setting, found = Setting("t5"), {}
    job = job_of(setting.variant)
    for sizes in MESHES:
        mesh = make_mesh(*sizes, topology.devices)
        state, frozen, batches = setting.place(mesh)
        leaves: list[Any] = jax.tree.leaves((state, frozen, batches[0]))
        found["x".join(map(str, sizes))] = {
            "shapes": plan.bytes_per_device(plan.job_arguments(job, mesh)),
            "live": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) + 8,  # the key
        }
    return found


def second_stage(topology: Topology) -> dict[str, Any]:
    """Facts of a plan of LLaVA's second stage, which trains the language model, on 2 x 2 x 2."""
    mesh = make_mesh(2, 2, 2, topology.devices)
    variant = packing.still("llava").replace(**packing.DIVISIBLE)
    job = dataclasses.replace(job_of(variant), trainable=("projector", "llm"))
    report, state = plan.compile_job(job, mesh), plan.job_arguments(job, mesh)[0]
    return {
        "ratio": report.flops / job.floor(),
        "fits": advice.verdict(job, mesh, topology, report)[0],
        "state": plan.bytes_per_device(state),
        "whole": 12 * sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "flags": [what for what, *_ in advice._changes(job, mesh, topology)],
    }
