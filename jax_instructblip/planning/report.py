"""The plan of a config: what a step needs of each chip, as a dict and as text."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning import advice, plan
from jax_instructblip.planning.chips import EFFORTS, GIB
from jax_instructblip.planning.explain import explain, explain_lines
from jax_instructblip.planning.job import fit_rows, read_job, read_variant
from jax_instructblip.planning.topology import read_topology
from jax_instructblip.planning.traffic import Traffic
from jax_instructblip.training.config_fields import check_config


def make_report(
    config: ConfigDict,
    topology: str,
    *,
    mesh: str = "",
    step: str = "train",
    effort: str = "quick",
    explained: bool = False,
) -> dict[str, Any]:
    """Compiles a step of a config and returns its plan as a dict of plain values.

    Args:
        config: the fields of `configs/common.py`.
        topology: chips, as in `v5e:4x4`, `h100:8` or `cpu:8`.
        mesh: sizes of data, fsdp and tensor, as in `1,16,1`; "" for those in the config.
        step: "train" or "decode".
        effort: the compiler's effort, a key of `EFFORTS`.
        explained: True adds the largest arrays and the copies (`explain`).

    Returns:
        What `lines` prints, by name: `fits`, `verdict`, `mesh`, `batch`, `memory` (bytes of a
        chip), `flops`, `moved` (by kind of collective), `bounds` (seconds) and others.

    Raises:
        ValueError: the config, the topology or the mesh is invalid.
    """
    check_config(config)
    chips = read_topology(topology)
    name, variant = read_variant(config)
    job = read_job(config, variant, step)
    sizes = _sizes(mesh) if mesh else dict(config.mesh)
    chip_mesh = make_mesh(**sizes, devices=chips.devices)
    report = plan.compile_job(job, chip_mesh, effort=EFFORTS[effort], options=chips.options)
    fits, sentence = advice.verdict(job, chip_mesh, chips, report)
    fitted = fit_rows(job, chip_mesh)
    row = fitted.row if fitted.samples_per_row > 1 else {}
    floor, count, chip = fitted.floor(), chip_mesh.size, chips.chip
    program = report.program
    moved = {} if program is None else program.moved()
    figures: dict[str, Any] = {
        "model": name,
        "step": step,
        "topology": chips.name,
        "chips": count,
        "mesh": dict(chip_mesh.shape),
        "batch": job.batch,
        "lengths": dict(job.lengths),
        "rows": {"samples": fitted.samples_per_row, **row},
        "remat": {tower: getattr(job.scans, tower).remat for tower in ("vision", "qformer", "llm")},
        "trainable": list(job.trainable),
        "patches": job.patches,
        "has_llm": job.variant.llm is not None,
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
            "useful": job.useful(),
            "per_chip": report.flops / count,
        },
        "moved": moved,
        "moved_bytes": sum(row["bytes"] for row in moved.values()),
        "unknown_loops": 0 if program is None else len(program.unknown),
        "seconds": {key: round(value, 1) for key, value in report.seconds.items()},
        "refusal": report.refusal,
        "fits": fits,
        "verdict": sentence,
        "remarks": advice.remarks(job, chip_mesh, chips),
    }
    if step == "decode":
        figures["new_tokens"] = job.new_tokens
    if program is not None and (step == "decode" or explained):
        traffic = Traffic(report.text, job.loops)
        if loop := traffic.decoding():
            needed = plan.token_bytes(job, chip_mesh)
            figures["token"] = {"read": loop.read, "written": loop.written, "needed": needed}
        if explained:
            figures["explain"] = explain(traffic)
    if chip is not None:
        figures["bounds"] = advice.estimate(figures, chip)
        if program is not None and program.cycles and effort == "full":
            figures["bounds"]["compiler"] = program.cycles / chip.clock
    return figures


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines that the command `plan` prints for what `make_report` returns."""
    mesh, memory, flops = report["mesh"], report["memory"], report["flops"]
    texts = ", ".join(f"{name} {length}" for name, length in report["lengths"].items())
    where = f"{report['topology']}, {report['chips']} chips"
    yield f"{report['model']}, {report['step']} step on {where}"
    yield "  mesh         " + ", ".join(f"{name} {size}" for name, size in mesh.items())
    work = f"{report['batch']} samples, {texts}"
    if report["step"] == "train":
        if report["has_llm"]:
            work += f"; remat of the language model: {report['remat']['llm']}"
        else:
            work += f"; remat of the Q-Former: {report['remat']['qformer']}"
        if "vision" in report["trainable"]:
            work += f", of the trained vision tower: {report['remat']['vision']}"
        if report["patches"]:
            work += "; patch features in place of pixels"
        work += f"; {report['accumulate']} part(s)"
    else:
        work += f"; {report['new_tokens']} new tokens"
    yield f"  batch        {work}"
    if report["rows"]["samples"] > 1:
        yield f"  rows         {_rows(report['rows'])}"
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
    if flops["useful"]:
        share = flops["useful"] / flops["counted"]
        yield f"  without padding {flops['useful']:.4g} FLOPs, {share:.1%} of them"
    if report["moved"]:
        yield "received by each chip in a step"
        for kind, row in sorted(report["moved"].items(), key=lambda item: -item[1]["bytes"]):
            yield f"  {kind:20}{row['count']:9,.0f} x {row['bytes'] / GIB:12.3f} GiB"
    if token := report.get("token"):
        yield (
            f"a chip reads {token['read'] / GIB:.3f} GiB for a new token; weights and cache are "
            f"{token['needed'] / GIB:.3f}"
        )
    if bounds := report.get("bounds"):
        text = f"at least {bounds['compute']:.3f} s of products, {bounds['links']:.3f} s of links"
        if "compiler" in bounds:
            text += f"; the compiler estimates {bounds['compiler']:.3f} s without waiting for links"
        yield f"a step takes {text}"
    took = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    yield f"took: {took} (effort: {report['effort']})"
    if "explain" in report:
        yield from explain_lines(report["explain"])
    yield from (f"note: {each}" for each in report["remarks"])
    if report["refusal"]:
        yield f"compiler: {report['refusal']}"
    yield f"verdict: {report['verdict']}"


def _rows(rows: Mapping[str, int]) -> str:
    """The text for rows of several samples: their widths, or that these are the widest."""
    slots, targets = rows["row_slots"], rows["row_targets"]
    if not slots:
        return f"of {rows['samples']} samples, each as long as its limits (config.plan.row_slots)"
    return f"of {rows['samples']} samples, {slots} slots, {targets} targets"


def _sizes(mesh: str) -> dict[str, int]:
    """Sizes by axis from the text `data,fsdp,tensor`, as in `1,16,1`; ValueError for others."""
    words = mesh.split(",")
    with contextlib.suppress(ValueError):
        if len(words) == 3:
            return dict(zip(("data", "fsdp", "tensor"), map(int, words), strict=True))
    raise ValueError(f"--mesh {mesh}: expected three sizes data,fsdp,tensor, as in 1,16,1")
