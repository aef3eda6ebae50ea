"""The memory that programs for GPUs read and write for each new token, from their compiled text.

python -m benchmarks.gpu_programs [--only TEXT]

Needs the extra `gpu`, no GPU, and minutes of a processor. Programs that answer are compiled for one
H200 from shapes alone: greedy answers, beam search, and the tree of a ranking's candidates, with
weights as `load` keeps them on a GPU ("loaded"; "int8" and "int4" with `quantise`) and for
comparison with the weights of all layers in stacks ("stacked"), as checkpoints have them. Writes
`gpu_programs.json` to `results`; `--only` makes the rows anew whose names have this text.

Several rows of int8 (beams) are compiled with Triton's products, which XLA chooses by time where it
has a device: those of cuBLAS, which the other programs have, take no whole numbers.

Bytes are those of the loop over tokens, each time (of a ranking: of its whole program): of its
kernels' operands (`read`) and results (`written`), beside the weights and the cache (`needed`),
which must be read once. Programs whose layers are not in stacks grow by the same with each layer:
they are compiled with one decoding layer and with two, and the bytes of all `layers` follow.
`--whole` compiles all layers instead.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import time
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import common
from jax_instructblip.atomic import write_file
from jax_instructblip.files import read_json
from jax_instructblip.inference import beam_search, ranking
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.models.released import VARIANTS
from jax_instructblip.models.variants import QUANTISED, T5Config, Variant
from jax_instructblip.models.vlm import param_shapes
from jax_instructblip.parallel.mesh import make_mesh, replicated
from jax_instructblip.planning import plan
from jax_instructblip.planning.explain import MIB
from jax_instructblip.planning.job import Job, read_job
from jax_instructblip.planning.topology import Topology, read_topology
from jax_instructblip.planning.traffic import Kernel, Traffic, copies

PATH = pathlib.Path(__file__).parent / "results" / "gpu_programs.json"
TOPOLOGY = "h200:1"
BEAMS, NEW_TOKENS = 5, 64
CANDIDATES = [(n, n + 7, n + 9) for n in range(3, 60)]  # ids
ALL = ("instructblip-vicuna-7b", "instructblip-flan-t5-xl", "blip2-opt-2.7b")
GREEDY = (*ALL, "instructblip-vicuna-13b", "instructblip-flan-t5-xxl", "llava-7b")
CASES = (  # model, program, batch, layout
    *((model, "greedy", 1, "loaded") for model in GREEDY),
    *((model, f"{BEAMS} beams", 1, "loaded") for model in ALL),
    *((model, "ranking", 1, "loaded") for model in ALL),
    *((model, "greedy", 8, "loaded") for model in ALL),
    *((model, "greedy", 1, form) for model in ALL for form in QUANTISED),
    *((model, f"{BEAMS} beams", 1, "int8") for model in ALL),
    *((model, "greedy", 1, "stacked") for model in ALL[:2]),
)
TRITON = {"xla_gpu_enable_triton_gemm": True}
COPIES = 6  # of weights, those listed of each loop


def config_of(batch: int, weights: str = "bfloat16") -> ConfigDict:
    """Returns the common config in bfloat16, for `batch` prompts of 64 tokens, 64 new tokens each.

    `weights` is `config.model.frozen_dtype`.
    """
    config = common.get_config()
    config.model.frozen_dtype, config.model.dtype = weights, "bfloat16"
    config.validation.batch_size, config.validation.max_new_tokens = batch, NEW_TOKENS
    config.text.prompt_limit = config.text.qformer_limit = 64
    return config


def depth(variant: Variant) -> int:
    """Returns the number of decoding layers of a model."""
    llm: Any = variant.llm
    return llm.decoder_layers if isinstance(llm, T5Config) else llm.layers


def with_layers(variant: Variant, layers: int) -> Variant:
    """Returns a model of that many decoding layers and the fewest of all others."""
    llm: Any = variant.llm
    fewer = {"decoder_layers": layers, "encoder_layers": 1}
    fewer = fewer if isinstance(llm, T5Config) else {"layers": layers}
    bridge: Any = variant.bridge
    if variant.kind != "llava":
        bridge = dataclasses.replace(bridge, layers=2)
    vision = dataclasses.replace(variant.vision, layers=2)
    llm = dataclasses.replace(llm, **fewer)
    return dataclasses.replace(variant, vision=vision, bridge=bridge, llm=llm)


def program(job: Job, mesh: Mesh, kind: str, layout: str) -> tuple[Any, tuple[Any, ...]]:
    """Returns a program that answers, a jitted function, and the shapes of its arguments.

    `kind` is "greedy", "ranking" or "5 beams"; `layout` is "loaded", "stacked", "int8" or "int4".
    """
    arguments = plan.job_arguments(job, mesh)
    place = lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=replicated(mesh))
    if layout == "stacked":
        whole = lambda leaf: place(leaf, job.frozen_dtype)
        arguments = (jax.tree.map(whole, param_shapes(job.variant)), *arguments[1:])
    params, batch, _ = arguments
    model = plan.answering_model(job, params)
    if kind == "greedy":
        return plan.job_function(job, mesh, arguments), arguments
    if kind == "ranking":
        prefill = lambda *inputs: model.apply({"params": inputs[0]}, inputs[1], 0, method="prefill")
        tree = ranking.make_plan([CANDIDATES]).chunks[0]
        inputs = (*jax.eval_shape(prefill, params, batch), tree)
        inputs = jax.tree.map(lambda leaf: place(leaf, leaf.dtype), inputs)
        return jax.jit(lambda *all: ranking.tree_logprobs(model, *all)), (params, *inputs)
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, num_beams=BEAMS)
    search = lambda params, batch: beam_search.beam_tokens(model, params, batch, settings)
    return jax.jit(search), (params, batch)


def measure(variant: Variant, kind: str, batch: int, layout: str, topology: Topology) -> Any:
    """Compiles a program of `batch` rows; returns a dict of its bytes for a token, and its copies.

    `kind` and `layout` are as in `program`.
    """
    quantised = layout in QUANTISED
    config = config_of(batch, layout) if quantised else config_of(batch)
    job = read_job(config, variant, "decode")
    if kind == "ranking":
        job = dataclasses.replace(job, new_tokens=1)
    mesh = make_mesh(1, 1, 1, topology.devices)
    function, arguments = program(job, mesh, kind, layout)
    options = dict(topology.options) | (TRITON if quantised and kind != "greedy" else {})
    clock, processor = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        compiled = function.trace(*arguments).lower().compile(options)
    traffic = Traffic(compiled.as_text(), job.loops)
    loop = traffic.decoding()
    kernels: Any = traffic.kernels if loop is None else loop.kernels
    stats: Any = compiled.memory_analysis()
    total = lambda name: sum(getattr(each, name) * each.times for each in kernels)
    beams = BEAMS if kind.endswith("beams") else 1
    sizes = {
        "read": total("read"),
        "written": total("written"),
        "needed": plan.token_bytes(job, mesh, beams),
        "temporaries": stats.temp_size_in_bytes,
    }
    return sizes | {
        "copies": list(weights_copied(kernels)),
        "compiled_in": {
            "seconds": round(time.perf_counter() - clock, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
        },
    }


def weights_copied(kernels: list[Kernel]) -> list[dict[str, Any]]:
    """Returns the largest copies of a program's weights, sizes in MiB; vectors are left out."""
    found = [each for each in copies(kernels) if "kernel" in each.source or "embed" in each.source]
    return [
        {
            "what": each.copies,
            "of": each.source,
            "read": round(each.read * each.times / MIB, 2),
            "shape": each.shape.partition("{")[0],
        }
        for each in found[:COPIES]
    ]


def row_of(case: tuple[str, str, int, str], whole: bool, topology: Topology) -> dict[str, Any]:
    """Returns the figures of a program with all layers, in MiB.

    `case` is one of `CASES`: model, kind, batch and layout. `whole` compiles all layers.
    """
    model, kind, batch, layout = case
    variant = VARIANTS[model]
    layers = depth(variant)
    whole = whole or layout == "stacked"
    if whole:
        found = measure(variant, kind, batch, layout, topology)
    else:
        one, found = (
            measure(with_layers(variant, n), kind, batch, layout, topology) for n in (1, 2)
        )
        for name in ("read", "written", "needed"):
            found[name] = one[name] + (layers - 1) * (found[name] - one[name])
        del found["temporaries"]  # of a model with fewer layers
    sizes = {name: round(n / MIB, 2) for name, n in found.items() if isinstance(n, int)}
    ratio = round(found["read"] / found["needed"], 3)
    counts = {"layers": layers, "compiled_layers": layers if whole else 2}
    return counts | {"read_over_needed": ratio} | found | sizes


def versions() -> dict[str, str]:
    """Returns the versions of the packages that make a GPU's program."""
    names = ("jax", "jaxlib", "jax-cuda12-plugin")
    return {name: importlib.metadata.version(name) for name in names}


def main() -> None:
    """Makes the rows and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="makes the rows whose name has this text")
    parser.add_argument("--whole", action="store_true", help="compiles all layers")
    flags = parser.parse_args()
    topology = read_topology(TOPOLOGY)
    found = read_json(PATH, dict)["programs"] if PATH.is_file() else {}
    for case in CASES:
        model, kind, batch, layout = case
        name = f"{model}, {kind}, batch {batch}, {layout}"
        if flags.only not in name:
            continue
        found[name] = row = row_of(case, flags.whole, topology)
        print(f"{name}: reads {row['read']:,} MiB of {row['needed']:,}", flush=True)
        document = {
            "command": "python -m benchmarks.gpu_programs",
            "topology": TOPOLOGY,
            "unit": "MiB a token",
            "versions": versions(),
            "programs": found,
        }
        write_file(PATH, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
