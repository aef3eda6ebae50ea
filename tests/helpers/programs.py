"""The compiled programs of small models, as facts that are recorded: for a CPU, for TPUs, for GPUs.

    python -m tests.helpers.programs cpu             the facts as JSON, on the last line
    python -m tests.helpers.programs cpu --record    writes tests/programs/cpu-0.10.2.json (the
                                                     version of jaxlib, then of a compiler whose
                                                     version is another) and prints what changed

`cpu` is one of `BACKENDS`; `v5e` and `h200` need the compilers of the extras `tpu` and `gpu`. Of
each kind of language model there are a training step and a greedy answer on a mesh of 2 x 2 x 2
devices, and on one device the pass over the prompt, a greedy answer, and a tree of candidates.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jax_instructblip.inference import ranking
from jax_instructblip.parallel.mesh import make_mesh, replicated
from jax_instructblip.planning import advice, plan
from jax_instructblip.planning.hlo import SHAPE
from jax_instructblip.planning.job import Job
from jax_instructblip.planning.topology import read_topology
from jax_instructblip.planning.traffic import Traffic, copies
from tests.helpers.interpreter import QUICK
from tests.helpers.multi_device import divisible
from tests.helpers.planned import held, job_of, second_stage

FOLDER = Path(__file__).resolve().parents[1] / "programs"
CANDIDATES = ((3, 4, 5), (3, 6, 7), (8, 9))  # ids; two begin alike


class Backend(NamedTuple):
    """The devices that programs are compiled for, and the distribution of their compiler."""

    several: str  # topology of the programs on 2 x 2 x 2 devices
    one: str
    trained: tuple[str, ...]  # kinds of language models whose training step is compiled
    dtype: str
    compiler: str


KINDS = ("llama", "t5")
BACKENDS = {
    "cpu": Backend("cpu:8", "cpu:8", ("t5",), "float32", "jaxlib"),
    "v5e": Backend("v5e:2x4", "v5e:1x1", KINDS, "bfloat16", "libtpu"),
    "h200": Backend("h200:8", "h200:1", KINDS, "bfloat16", "jax-cuda12-pjrt"),
}


def compiled(name: str) -> Iterator[tuple[str, Job, Mesh, plan.Report]]:
    """Yields each program of a backend: its name, its job and mesh, the report."""
    backend = BACKENDS[name]
    topology = read_topology(backend.several)
    mesh = make_mesh(2, 2, 2, topology.devices)
    for kind in backend.trained:
        for step, label in (("train", "train"), ("decode", "decode-split")):
            job = job_of(divisible(kind), step, dtype=backend.dtype)
            report = plan.compile_job(job, mesh, options=topology.options)
            yield f"{kind}-{label}", job, mesh, report
    topology = read_topology(backend.one)
    mesh = make_mesh(1, 1, 1, topology.devices[:1])
    for kind in KINDS:
        job = job_of(divisible(kind), "decode", rows=2, dtype=backend.dtype)
        for label, (function, arguments) in answering(job, mesh).items():
            report = plan.compile_function(
                function, arguments, mesh, loops=job.loops, options=topology.options
            )
            yield f"{kind}-{label}", job, mesh, report


def answering(job: Job, mesh: Mesh) -> dict[str, tuple[Any, tuple[Any, ...]]]:
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
    rank = jax.jit(lambda *inputs: ranking.tree_logprobs(model, *inputs))
    return {
        "prefill": (prefill, (params, batch)),
        "decode": (plan.job_function(job, mesh, arguments), arguments),
        "rank": (rank, (params, *jax.tree.map(place, inputs))),
    }


def facts(job: Job, mesh: Mesh, report: plan.Report) -> dict[str, Any]:
    """The FLOPs of a program, its bytes, the collectives by name, and what it copies."""
    traffic = Traffic(report.text, job.loops)
    found: dict[str, Any] = {
        "flops": report.flops,
        "bytes": {
            "arguments": report.arguments,
            "outputs": report.outputs,
            "temporaries": report.temporaries,
            "read": sum(each.read * each.times for each in traffic.kernels),
            "written": sum(each.written * each.times for each in traffic.kernels),
        },
        "loops of unknown length": len(report.program.unknown),
        "collectives": {},
        "copied arguments": {},
    }
    for each in report.program.collectives:
        # Several arrays may travel in one collective; each is named.
        for dtype, sizes in SHAPE.findall(each.shape):
            name = f"{each.kind} {dtype}[{sizes}]"
            found["collectives"][name] = found["collectives"].get(name, 0) + each.times
    for each in copies(traffic.kernels):
        if each.source:
            name = f"{each.copies}, {each.dtypes[0]} to {each.dtypes[1]}"
            copied = found["copied arguments"].get(name, 0)
            found["copied arguments"][name] = copied + each.read * each.times
    if (loop := traffic.decoding()) and mesh.size == 1:
        found["bytes"] |= {"token reads": loop.read, "token needs": plan.token_bytes(job, mesh)}
        found["copied in the loop"] = sorted(
            f"{each.copies} of {each.source}" for each in copies(loop.kernels) if each.source
        )
    return found


def widened(job: Job, report: plan.Report) -> list[str]:
    """The narrow kernels and tables that a program copies in float32; vectors are left out."""
    return sorted(
        each.source
        for each in copies(Traffic(report.text, job.loops).kernels)
        if each.dtypes == ("bf16", "f32") and re.search("kernel|embedding", each.source)
    )


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
    """The file of the facts that these versions of jaxlib and of the compiler gave."""
    compiler, jaxlib = BACKENDS[backend].compiler, importlib.metadata.version("jaxlib")
    version = importlib.metadata.version(compiler)
    own = "" if version == jaxlib else f"-{compiler}-{version}"
    return FOLDER / f"{backend}-{jaxlib}{own}.json"


def versions(backend: str) -> dict[str, str]:
    """The compiler and the machine that facts were recorded with."""
    compiler = BACKENDS[backend].compiler
    return {compiler: importlib.metadata.version(compiler), "machine": platform.machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("backend", choices=tuple(BACKENDS))
    parser.add_argument("--record", action="store_true")
    flags = parser.parse_args()
    # The same for every run, whatever the tests around it are given.
    os.environ["XLA_FLAGS"] = QUICK
    found: dict[str, Any] = {"programs": {}, "floors": {}, "widened": {}}
    for name, job, mesh, report in compiled(flags.backend):
        found["programs"][name] = facts(job, mesh, report)
        found["widened"][name] = widened(job, report)
        if name.endswith(("-train", "-decode", "-decode-split")):
            found["floors"][name] = job.floor()
    if flags.backend == "cpu":
        topology = read_topology("cpu:8")
        found["held"], found["llava"] = held(topology), second_stage(topology)
        found["meshes"] = advice.meshes(job_of(divisible("t5")), topology)
    if not flags.record:
        print(json.dumps(found))
        return
    path = recorded_at(flags.backend)
    print(f"recorded in {path.name}")
    before = json.loads(path.read_text())["programs"] if path.is_file() else {}
    print("\n".join(differences(found["programs"], before)) or "nothing changed")
    document = {"versions": versions(flags.backend), "programs": found["programs"]}
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
