"""Says what a step would need on chips that need not be there: memory, FLOPs, what moves.

    jax-instructblip plan --config configs/paper_vicuna_7b.py --topology v5e:4x4 --mesh 1,16,1

The step is compiled by the compiler of those chips (extra `tpu`); no weights are read. Exit code 0:
it fits; 1: it does not.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jax_instructblip.atomic import write_file
from jax_instructblip.commands.flags import check_flags
from jax_instructblip.commands.train import read_config
from jax_instructblip.files import read_json
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning import advice, plan
from jax_instructblip.planning.topology import GIB, Topology, known, read_topology
from jax_instructblip.training.config_fields import check_config

EFFORTS = {"quick": plan.QUICK, "full": 0.0}


def main(argv: list[str]) -> int:
    """Prints the plan, or of several the best; 0 where it fits."""
    flags, rest = _parser().parse_known_args(argv)
    check_flags(flags)
    config = read_config(rest)
    check_config(config)
    topology = read_topology(flags.topology)
    if flags.sweep:
        return _sweep(flags, rest, config, topology)
    report = make_report(config, topology, flags.mesh, flags.step, flags.effort)
    print("\n".join(lines(report)))
    _write(flags.json, report)
    return 0 if report["fits"] else 1


def make_report(
    config: ConfigDict, topology: Topology, mesh: str, step: str, effort: str
) -> dict[str, Any]:
    """The plan of a config as plain data; `mesh` as `--mesh` has it, or "" for the config's."""
    name, variant = plan.read_variant(config)
    job = plan.read_job(config, variant, step)
    sizes = _sizes(mesh) if mesh else dict(config.mesh)
    made = make_mesh(**sizes, devices=topology.devices)
    report = plan.compile_job(job, made, effort=EFFORTS[effort])
    fits, sentence = advice.verdict(job, made, topology, report)
    floor, count, chip = job.floor(), made.size, topology.chip
    program = report.program
    moved = {} if program is None else program.moved()
    found: dict[str, Any] = {
        "model": name,
        "step": step,
        "topology": topology.name,
        "chips": count,
        "mesh": dict(made.shape),
        "batch": job.batch,
        "lengths": dict(job.lengths),
        "remat": {tower: getattr(job.scans, tower).remat for tower in ("qformer", "llm")},
        "accumulate": job.accumulate,
        "effort": effort,
        "memory": {
            "arguments": report.arguments,
            "outputs": report.outputs,
            "temporaries": report.temporaries,
            "code": report.code,
            "residuals": report.residuals,
            "need": report.need,
            "chip": None if chip is None else int(chip.memory),
        },
        "flops": {
            "counted": report.flops,
            "floor": floor,
            "ratio": round(report.flops / floor, 4),
            "per_chip": report.flops / count,
        },
        "moved": moved,
        "moved_bytes": sum(row["bytes"] for row in moved.values()),
        "unknown_loops": 0 if program is None else len(program.unknown),
        "seconds": {key: round(value, 1) for key, value in report.seconds.items()},
        "refusal": report.refusal,
        "fits": fits,
        "verdict": sentence,
        "remarks": advice.remarks(job, made),
    }
    if step == "decode":
        found["new_tokens"] = job.new_tokens
    if chip is not None:
        found["bounds"] = advice.estimate(found, chip)
        if program is not None and program.cycles and effort == "full":
            found["bounds"]["compiler"] = program.cycles / chip.clock
    return found


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The plan for a person."""
    mesh, memory, flops = report["mesh"], report["memory"], report["flops"]
    texts = ", ".join(f"{name} {length}" for name, length in report["lengths"].items())
    where = f"{report['topology']}, {report['chips']} chips"
    yield f"{report['model']}, {report['step']} step on {where}"
    yield "  mesh         " + ", ".join(f"{name} {size}" for name, size in mesh.items())
    work = f"{report['batch']} samples, {texts}"
    if report["step"] == "train":
        work += f"; remat of the language model: {report['remat']['llm']}"
        work += f"; {report['accumulate']} part(s)"
    else:
        work += f"; {report['new_tokens']} new tokens"
    yield f"  batch        {work}"
    yield "memory of a chip, GiB"
    names = {
        "arguments": "weights, moments, batch",
        "temporaries": "temporaries",
        "outputs": "results",
        "code": "program",
        "need": "all",
        "chip": "a program may use",
    }
    for name, words in names.items():
        refused = report["refusal"] and name in ("temporaries", "outputs", "code")
        if memory[name] is not None and not refused:
            yield f"  {words:26}{memory[name] / GIB:9.2f}"
    if memory["residuals"]:
        yield f"  of it for backward, by shapes{memory['residuals'] / GIB:7.2f}"
    yield (
        f"products of a step: {flops['counted']:.4g} FLOPs, {flops['ratio']:.3f} x the count by "
        "hand"
    )
    if report["moved"]:
        yield "received by each chip in a step"
        for kind, row in sorted(report["moved"].items(), key=lambda item: -item[1]["bytes"]):
            yield f"  {kind:20}{row['count']:9,.0f} x {row['bytes'] / GIB:12.3f} GiB"
    if bounds := report.get("bounds"):
        text = f"at least {bounds['compute']:.3f} s of products, {bounds['links']:.3f} s of links"
        if "compiler" in bounds:
            text += f"; the compiler estimates {bounds['compiler']:.3f} s without waiting for links"
        yield f"a step takes {text}"
    took = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    yield f"took: {took} (effort: {report['effort']})"
    yield from (f"note: {each}" for each in report["remarks"])
    if report["refusal"]:
        yield f"compiler: {report['refusal']}"
    yield f"verdict: {report['verdict']}"


def _sweep(
    flags: argparse.Namespace, rest: list[str], config: ConfigDict, topology: Topology
) -> int:
    """Plans of several meshes and batches, each in a process of its own, and the best of them.

    A compiler that crashes or takes all memory then ends one plan alone.
    """
    _, variant = plan.read_variant(config)
    field = "data.batch_size" if flags.step == "train" else "validation.batch_size"
    asked = plan.read_job(config, variant, flags.step)
    first = asked.batch
    found, tried = [], []
    for batch in dict.fromkeys((first, first // 2, first * 2)):
        with config.unlocked():
            config.update_from_flattened_dict({field: batch})
        job = plan.read_job(config, variant, flags.step)
        tried += [(batch, sizes) for sizes in advice.likely(job, topology)]
    if not tried:
        raise ValueError(
            f"no mesh of {len(topology.devices)} chips holds this model and what a step keeps, or "
            f"none divides a batch of {first}: take more chips, another batch, "
            "--config.model.remat.llm=full or --config.train.accumulate=2"
        )
    # The config's batch first, then meshes by how much they would move.
    tried.sort(key=lambda each: (each[0] != first, advice.moves(asked, each[0], each[1])))
    for number, (batch, sizes) in enumerate(tried[: flags.tries], 1):
        mesh = ",".join(map(str, sizes))
        print(f"{number}/{min(len(tried), flags.tries)}: mesh {mesh}, batch {batch}", flush=True)
        words = [*rest, f"--config.{field}={batch}", "--topology", flags.topology, "--mesh", mesh]
        report = _elsewhere([*words, "--step", flags.step, "--effort", flags.effort])
        if "verdict" in report:
            found.append(report)
        print(f"  {report.get('verdict', report.get('error'))}", flush=True)
    chosen = advice.best(found, first)
    print("\n".join(table(found)))
    if chosen is None:
        print("none of these fits: raise --tries, or take more chips")
    else:
        mesh = ",".join(str(size) for size in chosen["mesh"].values())
        print(f"recommended: --mesh {mesh}, batch {chosen['batch']}")
    _write(flags.json, {"recommended": chosen, "tried": found})
    return 0 if chosen else 1


def table(reports: list[dict[str, Any]]) -> Iterator[str]:
    """One row a plan."""
    yield "mesh          batch  need GiB  fits  moved GiB  products s  links s"
    for each in reports:
        mesh = ",".join(str(size) for size in each["mesh"].values())
        bounds = each.get("bounds", {"compute": float("nan"), "links": float("nan")})
        yield (
            f"{mesh:12} {each['batch']:6} {each['memory']['need'] / GIB:9.2f}  "
            f"{'yes' if each['fits'] else 'no':4}  {each['moved_bytes'] / GIB:9.2f}  "
            f"{bounds['compute']:10.3f}  {bounds['links']:7.3f}"
        )


def _elsewhere(words: list[str]) -> dict[str, Any]:
    """The plan that another process makes, or `error` with its last words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        command = [sys.executable, "-m", "jax_instructblip", "plan", *words, "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if path.is_file():
            return read_json(path, dict, allow_nan=True)
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"error": last[0]}


def _sizes(mesh: str) -> dict[str, int]:
    """The sizes of `data,fsdp,tensor`."""
    words = mesh.split(",")
    with contextlib.suppress(ValueError):
        if len(words) == 3:
            return dict(zip(("data", "fsdp", "tensor"), map(int, words), strict=True))
    raise ValueError(f"--mesh {mesh}: expected three sizes data,fsdp,tensor, as in 1,16,1")


def _write(path: Path | None, report: Mapping[str, Any]) -> None:
    if path is not None:
        write_file(path, json.dumps(report, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip plan",
        usage="%(prog)s --config FILE --topology NAME [--config.FIELD=VALUE ...]",
        description=__doc__,
        epilog=f"Topologies: {', '.join(known())}; the compiler takes further sizes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--topology", required=True, metavar="NAME", help="chips, as in v5e:4x4")
    add("--mesh", default="", metavar="D,F,T", help="sizes of data, fsdp, tensor (the config's)")
    add("--step", choices=("train", "decode"), default="train", help="what is compiled (train)")
    add("--sweep", action="store_true", help="tries meshes and batches, recommends one")
    add("--tries", type=int, default=6, metavar="N", help="most plans of a sweep (6)")
    add("--effort", choices=tuple(EFFORTS), default="quick", help="of the compiler (quick)")
    add("--json", type=Path, metavar="FILE", help="writes the plan there, too")
    return parser
