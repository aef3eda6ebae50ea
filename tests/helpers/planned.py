"""Plans for eight devices beside what such arrays really take: run in a process of its own.

    JAX_NUM_CPU_DEVICES=8 python -m tests.helpers.planned

The answer is JSON. Texts are as long as the batches of `tests/helpers/multi_device.py`.
"""

import dataclasses
import json

import jax

from configs import common
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning import advice, plan
from jax_instructblip.planning.job import read_job
from jax_instructblip.planning.topology import read_topology
from tests.helpers import packing
from tests.helpers.multi_device import Setting

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2))


def job_of(variant, step="train", rows=16):
    """The job of a config for batches of `tests/helpers/tiny.py`."""
    config = common.get_config()
    config.model.frozen_dtype = config.model.dtype = "float32"
    config.data.batch_size = config.validation.batch_size = rows
    config.validation.max_new_tokens = 4
    config.text.qformer_limit, config.text.prompt_limit, config.text.answer_limit = 9, 9, 6
    return read_job(config, variant, step)


def held(tree) -> int:
    """Bytes of the first device's part of real arrays."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def main() -> None:
    topology = read_topology("cpu:8")
    setting, found = Setting("t5"), {"held": {}}
    job = job_of(setting.variant)
    for sizes in MESHES:
        mesh = make_mesh(*sizes, topology.devices)
        state, frozen, batches = setting.place(mesh)
        found["held"]["x".join(map(str, sizes))] = {
            "shapes": plan.bytes_per_device(plan.job_arguments(job, mesh)),
            "live": held((state, frozen, batches[0])) + 8,  # and the key
        }
    report = plan.compile_job(job, mesh)
    found["train"] = {
        "arguments": report.arguments,
        "temporaries": report.temporaries,
        "ratio": report.flops / job.floor(),
        "moved": report.program.moved(),
        "unknown": report.program.unknown,
        "fits": advice.verdict(job, mesh, topology, report)[0],
    }
    job = job_of(setting.variant, "decode")
    report = plan.compile_job(job, mesh)
    found["decode"] = {
        "ratio": report.flops / job.floor(),
        "unknown": len(report.program.unknown),
    }
    variant = packing.still("llava").replace(**packing.DIVISIBLE)
    job = dataclasses.replace(job_of(variant), trainable=("projector", "llm"))
    report, state = plan.compile_job(job, mesh), plan.job_arguments(job, mesh)[0]
    found["llava"] = {
        "ratio": report.flops / job.floor(),
        "fits": advice.verdict(job, mesh, topology, report)[0],
        "state": plan.bytes_per_device(state),
        "whole": 12 * sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "flags": [what for what, *_ in advice._changes(job, mesh, topology)],
    }
    found["meshes"] = advice.meshes(job_of(setting.variant), topology)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
