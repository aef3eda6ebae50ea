"""The memory that programs for GPUs read and write for each new token, from their compiled text.

python -m benchmarks.gpu_programs [--only TEXT]

Needs the extra `gpu`, no GPU, and minutes of a processor: greedy answers are compiled for one H200
from shapes alone, once with the weights of all layers in stacks ("stacked"), as checkpoints have
them, and once as `load` keeps them on a GPU ("loaded"). Writes `gpu_programs.json` to `results`;
`--only` makes the rows anew whose names have this text.

Bytes are those of the loop over tokens, each time: of its kernels' operands (`read`) and results
(`written`), beside the weights and the cache (`needed`), which must be read once.
"""

import argparse
import importlib.metadata
import json
import pathlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import common
from jax_instructblip.atomic import write_file
from jax_instructblip.files import read_json
from jax_instructblip.models.released import VARIANTS
from jax_instructblip.models.vlm import param_shapes
from jax_instructblip.parallel.mesh import make_mesh, replicated
from jax_instructblip.planning import plan
from jax_instructblip.planning.explain import MIB
from jax_instructblip.planning.job import Job, read_job
from jax_instructblip.planning.topology import Topology, read_topology
from jax_instructblip.planning.traffic import Traffic, copies

PATH = pathlib.Path(__file__).parent / "results" / "gpu_programs.json"
TOPOLOGY = "h200:1"
MODELS = ("tiny-vicuna", "tiny-t5", "instructblip-vicuna-7b", "instructblip-flan-t5-xl")
BATCHES = (1, 8)
LAYOUTS = ("stacked", "loaded")
COPIES = 6  # of weights, those listed of each loop


def config_of(batch: int) -> ConfigDict:
    """Returns the common config in bfloat16: prompts of 64 tokens, 64 new tokens."""
    config = common.get_config()
    config.model.frozen_dtype = config.model.dtype = "bfloat16"
    config.validation.batch_size, config.validation.max_new_tokens = batch, 64
    config.text.prompt_limit = config.text.qformer_limit = 64
    return config


def measure(job: Job, topology: Topology, layout: str) -> dict[str, Any]:
    """Compiles a job of step "decode"; returns the bytes of a token in MiB, and the copies."""
    mesh = make_mesh(1, 1, 1, topology.devices)
    arguments = plan.job_arguments(job, mesh)
    if layout == "stacked":
        whole = lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, job.frozen_dtype, sharding=replicated(mesh)
        )
        arguments = (jax.tree.map(whole, param_shapes(job.variant)), *arguments[1:])
    clock, processor = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        traced = plan.job_function(job, mesh, arguments).trace(*arguments)
        compiled = traced.lower().compile(dict(topology.options))
    seconds = {
        "seconds": round(time.perf_counter() - clock, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
    }
    loop = Traffic(compiled.as_text(), job.loops).decoding()
    assert loop is not None
    stats: Any = compiled.memory_analysis()
    needed = plan.token_bytes(job, mesh)
    mib = lambda size: round(size / MIB, 2)
    return {
        "read": mib(loop.read),
        "written": mib(loop.written),
        "needed": mib(needed),
        "read_over_needed": round(loop.read / needed, 3),
        "copies": [
            {
                "what": each.copies,
                "of": each.source,
                "read": mib(each.read * each.times),
                "shape": each.shape.partition("{")[0],
            }
            for each in [each for each in copies(loop.kernels) if each.source][:COPIES]
        ],
        "temporaries": mib(stats.temp_size_in_bytes),
        "compiled_in": seconds,
    }


def main() -> None:
    """Makes the rows and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="makes the rows whose name has this text")
    flags = parser.parse_args()
    topology = read_topology(TOPOLOGY)
    found = read_json(PATH, dict)["programs"] if PATH.is_file() else {}
    for model in MODELS:
        for batch in BATCHES:
            for layout in LAYOUTS:
                name = f"{model}, batch {batch}, {layout}"
                if flags.only not in name:
                    continue
                job = read_job(config_of(batch), VARIANTS[model], "decode")
                found[name] = measure(job, topology, layout)
                row = found[name]
                print(f"{name}: reads {row['read']:,} MiB of {row['needed']:,}", flush=True)
                document = {
                    "command": "python -m benchmarks.gpu_programs",
                    "topology": TOPOLOGY,
                    "unit": "MiB a token",
                    "versions": {
                        package: importlib.metadata.version(package)
                        for package in ("jax", "jaxlib", "jax-cuda12-plugin")
                    },
                    "programs": found,
                }
                write_file(PATH, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
