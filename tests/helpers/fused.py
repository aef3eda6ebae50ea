"""Attention compiled for eight GPUs, with einsums and with cuDNN: facts of the programs as JSON.

    python -m tests.helpers.fused

Needs the compiler of the extra `gpu`, no GPU.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jax_instructblip.models.attention import attend
from jax_instructblip.models.masks import causal_mask
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning import plan
from jax_instructblip.planning.topology import read_topology

ROWS, SLOTS, HEADS, WIDTH = 8, 32, 4, 16
BATCH = ("data", "fsdp")


def facts(fused: bool) -> dict:
    """FLOPs, cuDNN's calls, collectives and arrays of scores of attention's gradient."""
    topology = read_topology("h200:8")
    mesh = make_mesh(2, 2, 2, topology.devices)
    shape = functools.partial(jax.ShapeDtypeStruct, (ROWS, SLOTS, HEADS, WIDTH), jnp.bfloat16)
    heads = shape(sharding=NamedSharding(mesh, PartitionSpec(BATCH, None, "tensor")))
    rows = NamedSharding(mesh, PartitionSpec(BATCH))
    segments = jax.ShapeDtypeStruct((ROWS, SLOTS), jnp.int32, sharding=rows)

    def gradient(query, key, value, segments, weights):
        mixed = lambda *factors: attend(*factors, mask=causal_mask(segments), fused=fused)
        return jax.vjp(mixed, query, key, value)[1](weights)

    arguments = (heads, heads, heads, segments, heads)
    report = plan.compile_function(
        jax.jit(gradient, out_shardings=(heads.sharding,) * 3),
        arguments,
        mesh,
        options=topology.options,
    )
    local = f"{ROWS // 4},{HEADS // 2},{SLOTS},{SLOTS}"
    return {
        "flops": report.flops,
        "calls": sorted(set(re.findall(r'"(__cudnn[^"]+)"', report.text))),
        "scores": sorted(set(re.findall(rf"\w+\[{local}\]", report.text))),
        "collectives": len(report.program.collectives),
    }


if __name__ == "__main__":
    print(json.dumps({"einsum": facts(False), "fused": facts(True)}))
