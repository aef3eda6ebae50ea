"""The compiled programs of small models, as facts that are recorded: for a CPU, for TPUs, for GPUs.

    python -m tests.helpers.programs cpu             the facts as JSON, on the last line
    python -m tests.helpers.programs cpu --record    writes tests/programs/cpu-0.10.2.json (the
                                                     version of jaxlib) and prints what changed

`cpu` is one of `BACKENDS`; `v5e` and `h200` need the compilers of the extras `tpu` and `gpu`. Of
each kind of language model there are four programs: a training step on a mesh of 2 x 2 x 2 devices,
and on one device the pass over the prompt, a greedy answer, and a tree of candidates.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from configs import common
from jax_instructblip.inference import ranking
from jax_instructblip.models import flops
from jax_instructblip.parallel.mesh import make_mesh, replicated
from jax_instructblip.planning import plan
from jax_instructblip.planning.job import Job, read_job
from jax_instructblip.planning.topology import read_topology
from jax_instructblip.planning.traffic import Traffic, copies
from tests.helpers.multi_device import LOW, divisible

FOLDER = Path(__file__).resolve().parents[1] / "programs"
# Topologies of the training step and of all else; the distribution whose version the compiler has.
BACKENDS = {
    "cpu": ("cpu:8", "cpu:1", "jaxlib"),
    "v5e": ("v5e:2x4", "v5e:1x1", "libtpu"),
    "h200": ("h200:8", "h200:1", "jax-cuda12-pjrt"),
}
KINDS = ("llama", "t5")
ROWS, TOKENS = 16, 9
CANDIDATES = ((3, 4, 5), (3, 6, 7), (8, 9))  # ids; two begin alike
# Compilers of these programs are given these flags alone, whatever the tests around them are given.
FLAGS = "--xla_backend_optimization_level=0"


def job_of(kind: str, step: str, dtype: str) -> Job:
    """A step of the common config with short texts, for a small model of that kind."""
    config = common.get_config()
    config.model.frozen_dtype = config.model.dtype = dtype
    config.data.batch_size, config.validation.batch_size = ROWS, 2
    config.validation.max_new_tokens = 5
    config.text.qformer_limit = config.text.prompt_limit = TOKENS
    config.text.answer_limit = 6
    return read_job(config, divisible(kind, **LOW), step)


def programs(backend: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the facts of each program of a backend."""
    dtype = "float32" if backend == "cpu" else "bfloat16"
    several, one, _ = BACKENDS[backend]
    topology = read_topology(several)
    mesh = make_mesh(2, 2, 2, topology.devices)
    for kind in KINDS:
        job = job_of(kind, "train", dtype)
        arguments = plan.job_arguments(job, mesh)
        function = plan.job_function(job, mesh, arguments)
        yield f"{kind}-train", facts(job, mesh, function, arguments, topology.options)
    topology = read_topology(one)
    mesh = make_mesh(1, 1, 1, topology.devices[:1])
    for kind in KINDS:
        job = job_of(kind, "decode", dtype)
        for name, (function, arguments) in answering(job, mesh).items():
            yield f"{kind}-{name}", facts(job, mesh, function, arguments, topology.options)


def answering(job: Job, mesh: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The programs that answer, as jitted functions and the shapes of their arguments."""
    arguments = plan.job_arguments(job, mesh)
    params, batch, _ = arguments
    model = plan.answering_model(job, params)
    prefill = jax.jit(
        lambda params, batch: model.apply(
            {"params": params}, batch, job.new_tokens - 1, method="prefill"
        )
    )
    tree = ranking.make_plan([CANDIDATES]).chunks[0]
    inputs = (*jax.eval_shape(prefill, params, batch), tree)
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))
    rank = jax.jit(functools.partial(ranking.tree_logprobs, model))
    return {
        "prefill": (prefill, (params, batch)),
        "decode": (plan.job_function(job, mesh, arguments), arguments),
        "rank": (rank, (params, *jax.tree.map(place, inputs))),
    }


def facts(
    job: Job, mesh: Any, function: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The FLOPs of a program, its bytes, the collectives by name, and what it copies."""
    with jax.set_mesh(mesh):
        traced = function.trace(*arguments)
        compiled = traced.lower().compile(dict(options))
    stats, text = compiled.memory_analysis(), compiled.as_text()
    traffic = Traffic(text, job.loops)
    found: dict[str, Any] = {
        "flops": flops.count(traced.jaxpr.jaxpr, loops=job.loops),
        "bytes": {
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "read": sum(each.read * each.times for each in traffic.kernels),
            "written": sum(each.written * each.times for each in traffic.kernels),
        },
        "collectives": {},
        "copied": {},
    }
    for each in plan.hlo.read_program(text, mesh.size, job.loops).collectives:
        name = f"{each.kind} {each.shape.partition('{')[0]}"
        found["collectives"][name] = found["collectives"].get(name, 0) + each.times
    for each in copies(traffic.kernels):
        if each.source:
            name = f"{each.copies} {each.dtypes[0]} to {each.dtypes[1]}"
            found["copied"][name] = found["copied"].get(name, 0) + each.read * each.times
    if loop := traffic.decoding():
        found["bytes"] |= {"token reads": loop.read, "token needs": plan.token_bytes(job, mesh)}
        found["copied in the loop"] = sorted(
            f"{each.copies} of {each.source} to {each.dtypes[1]}"
            for each in copies(loop.kernels)
            if "params" in each.source
        )
    return found


def differences(found: Any, recorded: Any, where: str = "") -> Iterator[str]:
    """Yields a line for each fact that differs; bytes may differ by one in a hundred."""
    if isinstance(found, Mapping) and isinstance(recorded, Mapping):
        for name in sorted({*found, *recorded}):
            yield from differences(found.get(name), recorded.get(name), f"{where}/{name}")
        return
    numbers = isinstance(found, int) and isinstance(recorded, int)
    near = numbers and "/bytes/" in where and abs(found - recorded) <= 0.01 * recorded
    if found != recorded and not near:
        yield f"{where.strip('/')}: recorded {recorded}, now {found}"


def recorded_at(backend: str) -> Path:
    """The file of the facts that this version of jaxlib gave."""
    return FOLDER / f"{backend}-{importlib.metadata.version('jaxlib')}.json"


def versions(backend: str) -> dict[str, str]:
    """The compiler and the machine that facts were recorded with."""
    compiler = BACKENDS[backend][2]
    return {compiler: importlib.metadata.version(compiler), "machine": platform.machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("backend", choices=tuple(BACKENDS))
    parser.add_argument("--record", action="store_true")
    flags = parser.parse_args()
    os.environ["XLA_FLAGS"] = FLAGS
    found = dict(programs(flags.backend))
    path = recorded_at(flags.backend)
    if not flags.record:
        print(json.dumps(found))
        return
    before = json.loads(path.read_text())["programs"] if path.is_file() else {}
    print("\n".join(differences(found, before)) or "nothing changed")
    document = {"versions": versions(flags.backend), "programs": found}
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
