"""The memory and traffic of training steps on GPUs, with each kind of attention, from their text.

python -m benchmarks.gpu_training [--only TEXT]

Needs the extra `gpu`, no GPU, and minutes of a processor for each row: steps of the paper's configs
are compiled for the GPUs of `CASES`, with `config.model.attention` "einsum" and "auto". Writes
`gpu_training.json` to `results`; `--only` makes the rows anew whose names have this text.

Bytes are GiB of one GPU: `temporaries` are held at the peak of the step; `read` and `written` are
those of all kernels of a step, except that a library's call may read its operands more than once.
`kernels` counts the calls of cuDNN, those in a loop once. Their working memory is allocated when
they run, so it is in no figure.
"""

import argparse
import json
import pathlib
import re
from typing import Any

from benchmarks.gpu_programs import versions
from configs import paper_flan_t5_xl, paper_vicuna_7b, paper_vicuna_13b
from jax_instructblip.atomic import write_file
from jax_instructblip.files import read_json
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning import advice, plan
from jax_instructblip.planning.chips import GIB
from jax_instructblip.planning.job import read_job, read_variant
from jax_instructblip.planning.topology import read_topology
from jax_instructblip.planning.traffic import Traffic, copies

PATH = pathlib.Path(__file__).parent / "results" / "gpu_training.json"
CONFIGS = {"7b": paper_vicuna_7b, "13b": paper_vicuna_13b, "xl": paper_flan_t5_xl}
CASES = (("7b", "h200:1", (1, 1, 1)), ("xl", "h200:1", (1, 1, 1)), ("13b", "h100:8", (1, 8, 1)))
ATTENTIONS = ("auto", "einsum")


def measure(name: str, where: str, sizes: tuple[int, int, int], attention: str) -> dict[str, Any]:
    """Compiles a training step; returns its bytes in GiB, FLOPs, collectives and cuDNN's calls.

    The first three arguments are a row of `CASES`: a key of `CONFIGS`, the topology, and the sizes
    of the mesh (data, fsdp, tensor). `attention` is one of `ATTENTIONS`.
    """
    config = CONFIGS[name].get_config()
    config.model.attention = attention
    topology = read_topology(where)
    mesh = make_mesh(*sizes, topology.devices)
    job = read_job(config, read_variant(config)[1])
    report = plan.compile_job(job, mesh, options=topology.options)
    kernels = Traffic(report.text).kernels
    gib = lambda size: round(size / GIB, 2)
    assert report.program is not None
    return {
        "batch": job.batch,
        "arguments": gib(report.arguments),
        "temporaries": gib(report.temporaries),
        "for the backward pass": gib(report.residuals),
        "read": gib(sum(each.read * each.times for each in kernels)),
        "written": gib(sum(each.written * each.times for each in kernels)),
        "copied": gib(sum(each.read * each.times for each in copies(kernels))),
        "flops": report.flops,
        "kernels": len(re.findall(r'custom_call_target="__cudnn\$fmha', report.text)),
        "collectives": {
            kind: {"count": row["count"], "gib": gib(row["bytes"])}
            for kind, row in report.program.moved().items()
        },
        "verdict": advice.verdict(job, mesh, topology, report)[1],
        "seconds": round(sum(report.seconds.values())),
    }


def main() -> None:
    """Makes the rows and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="makes the rows whose name has this text")
    flags = parser.parse_args()
    found = read_json(PATH, dict)["steps"] if PATH.is_file() else {}
    for name, where, sizes in CASES:
        for attention in ATTENTIONS:
            title = f"{name}, {where}, {attention}"
            if flags.only not in title:
                continue
            found[title] = row = measure(name, where, sizes, attention)
            print(f"{title}: temporaries {row['temporaries']} GiB, {row['verdict']}", flush=True)
            document = {
                "command": "python -m benchmarks.gpu_training",
                "unit": "GiB of one GPU",
                "versions": versions(),
                "steps": found,
            }
            write_file(PATH, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
