"""Attention compiled for eight chips, by einsums and by a kernel: facts of the programs as JSON.

    python -m tests.helpers.attention_programs h200:8 | v5e:2x4

Needs the compiler of the extra `gpu` or `tpu`, no chip.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jax_instructblip.models.attention import attend
from jax_instructblip.models.attention_kernels import CausalRows, kernel_for
from jax_instructblip.models.masks import causal_mask
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning import plan
from jax_instructblip.planning.topology import read_topology

ROWS, HEADS = 8, 4
SIZES = {"cudnn": (32, 16), "splash": (256, 128)}  # slots of a row, width of a head
BATCH = ("data", "fsdp")


def facts(name: str, fused: bool) -> dict:
    """FLOPs, kernels, collectives and arrays of scores of attention's gradient."""
    topology = read_topology(name)
    mesh = make_mesh(2, 2, 2, topology.devices)
    kernel = kernel_for(topology.devices[0])
    slots, width = SIZES[kernel]
    shape = functools.partial(jax.ShapeDtypeStruct, (ROWS, slots, HEADS, width), jnp.bfloat16)
    heads = shape(sharding=NamedSharding(mesh, PartitionSpec(BATCH, None, "tensor")))
    rows = NamedSharding(mesh, PartitionSpec(BATCH))
    segments = jax.ShapeDtypeStruct((ROWS, slots), jnp.int32, sharding=rows)

    def gradient(query, key, value, segments, weights):
        mask = CausalRows(causal_mask(segments), segments)
        mixed = lambda *factors: attend(*factors, mask=mask, fused=kernel if fused else "")
        return jax.vjp(mixed, query, key, value)[1](weights)

    arguments = (heads, heads, heads, segments, heads)
    report = plan.compile_function(
        jax.jit(gradient, out_shardings=(heads.sharding,) * 3),
        arguments,
        mesh,
        options=topology.options,
    )
    local = f"{ROWS // 4},{HEADS // 2},{slots},{slots}"
    calls = re.findall(r'"(__cudnn[^"]+|tpu_custom_call)"', report.text)
    return {
        "flops": report.flops,
        "calls": sorted(set(calls)),
        "scores": sorted(set(re.findall(rf"\w+\[{local}\]", report.text))),
        "collectives": len(report.program.collectives),
    }


if __name__ == "__main__":
    print(json.dumps({"einsum": facts(sys.argv[1], False), "fused": facts(sys.argv[1], True)}))
