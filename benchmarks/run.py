"""Compares this package with other libraries: one suite a call; writes figures, table and plot.

    python -m benchmarks.run --suite train|generate|rank|convert|input [--device cpu|gpu]
        [--against transformers,keras_hub] [--sizes tiny|middle|full] [--only WORD ...] [--out FILE]

Each side runs in a process of its own (`sides.py`), on the same samples, shapes and dtype. On a CPU
both have the same random float32 weights, and their calls alternate; on a GPU weights are random
bfloat16 ones that each side makes on the device. Times are medians after a warm-up; memory is the
peak of the process, on a GPU of the device. Results are written after each case to
`benchmarks/results/NAME.json`, with a plot beside it; with --resume, cases that are there already
are skipped. A library that is not installed is skipped, and named.
"""

import argparse
import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import input_pipeline
from benchmarks.plot import draw
from benchmarks.sides import OURS, ROOT, Case, compare, shown, without_values
from benchmarks.workload import SIZES, facts
from jax_instructblip.atomic import write_file

SUITES = {"train": "training", "generate": "generation", "rank": "ranking", "convert": "conversion"}
RIVALS = ("transformers", "keras_hub")
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """Measures the cases of a suite, writes and prints them; returns 1 if one has failed."""
    flags = _read_flags()
    if flags.suite == "input":
        input_pipeline.run(flags)
        return 0
    module = importlib.import_module(f"benchmarks.{SUITES[flags.suite]}")
    sides, skipped = choose_sides(module.SIDES, flags.against.split(","))
    document = {
        **facts("run", sys.argv[1:]),
        "skipped": skipped,
        "dtype": flags.dtype,
        "results": _earlier(flags.out) if flags.resume else [],
    }
    for reason in skipped:
        print(f"skipped: {reason}")
    done = [row["case"] for row in document["results"] if "error" not in row]
    document["results"] = [row for row in document["results"] if "error" not in row]
    start, failed = time.monotonic(), False
    with tempfile.TemporaryDirectory() as work:
        for case in _cases(flags, module, pathlib.Path(work)):
            if shown(case) in done:
                continue
            if time.monotonic() - start > flags.budget:
                print(f"{flags.budget} s are over: the same command with --resume goes on")
                break
            row = _measured(case, sides, flags)
            failed |= "error" in row
            document["results"].append(row)
            write_file(flags.out, json.dumps(document, indent=1) + "\n")
            print(row.get("error") or line(row), flush=True)
    draw(document["results"], flags.out.with_suffix(".png"))
    print("\n".join(["", *table(document["results"]), f"written to {flags.out}"]))
    return 1 if failed else 0


def choose_sides(known: Sequence[str], against: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the sides to measure, ours first, and a reason for each rival that is left out.

    `known` are the sides of the suite (its `SIDES`), `against` the rivals that are asked for.

    Raises:
        ValueError: a rival is none of `RIVALS`.
    """
    if unknown := sorted(set(against) - set(RIVALS)):
        raise ValueError(f"--against {', '.join(unknown)}: expected some of {', '.join(RIVALS)}")
    sides, skipped = [OURS], []
    for rival in against:
        own = [side for side in known if side == rival or side.startswith(f"{rival}_")]
        if importlib.util.find_spec(rival) is None:
            skipped.append(f"{rival} is not installed")
        elif not own:
            skipped.append(f"{rival} has no InstructBLIP to compare with here")
        else:
            sides += own
    return sides, skipped


def line(row: dict[str, Any]) -> str:
    """Returns one row of results (`sides.compare`) as a line of text."""
    case = ", ".join(str(value) for name, value in row["case"].items() if name in _SHOWN)
    parts = [
        f"{rival}: {ratio[_RATIOS[0]]:.2f} x ({ratio[_RATIOS[1]]:.2f} of processor time), "
        f"memory {ratio['memory']:.2f}"
        for rival, ratio in row["ratios"].items()
    ]
    return f"{case}: {'; '.join(parts)}"


_SHOWN = ("suite", "variant", "batch", "beams", "candidates")


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a Markdown table: how many times as fast ours is, and its share of the memory."""
    lines = [
        "| case | ours | theirs | times as fast | processor | memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {' '.join(map(str, row['case'].values()))} | failed | | | | |")
            continue
        names = {"batch": "batch {}", "beams": "{} beams", "candidates": "{} candidates"}
        words = [
            form.format(row["case"][name]) for name, form in names.items() if name in row["case"]
        ]
        for rival, ratio in row["ratios"].items():
            cells = [" ".join([row["case"]["variant"], *words, f"({rival})"])]
            cells += [_rate(row["sides"][side]) for side in (OURS, rival)]
            cells += [f"{ratio[name]:.2f}" for name in _RATIOS]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


_RATIOS = ("times_as_fast", "times_as_fast_by_processor_seconds", "memory")


def _rate(side: dict[str, Any]) -> str:
    if "per_second" in side:
        return f"{side['per_second']:.4g} {side['unit']}/s"
    return f"{side['seconds']:.3g} s"


def _measured(case: Case, sides: Sequence[str], flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of a case, with its `error` if a side has failed."""
    try:
        row = compare(case, sides, repeats=flags.repeats, warm_up=flags.warm_up)
    except RuntimeError as error:
        return {"case": shown(case), "error": str(error)}
    return without_values(row)


def _cases(flags: argparse.Namespace, module: Any, work: pathlib.Path) -> list[Case]:
    """Returns the cases to measure; writes the weights that both sides read."""
    common = {"suite": SUITES[flags.suite], "device": flags.device, "dtype": flags.dtype}
    chosen: list[Case] = []
    for case in module.cases(flags.sizes):
        words = {f"{name}={value}" for name, value in case.items()}
        if not set(flags.only) <= words:
            continue
        chosen.append(common | case | {"work": str(work)})
    if not chosen:
        raise ValueError(f"--only {' '.join(flags.only)}: no case of the suite has these fields")
    if flags.dtype == "float32":  # else each side makes random weights of its own on the device
        for name in dict.fromkeys(case["variant"] for case in chosen):
            program = "import sys, pathlib; from benchmarks.theirs import write_folder; "
            program += "write_folder(sys.argv[1], pathlib.Path(sys.argv[2]))"
            words = [sys.executable, "-c", program, name, str(work / name)]
            subprocess.run(words, check=True, cwd=ROOT)
        chosen = [case | {"folder": str(work / case["variant"])} for case in chosen]
    return chosen


def _earlier(path: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else []


def _read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", choices=(*SUITES, "input"), required=True)
    add("--device", choices=("cpu", "gpu"), default="cpu")
    add("--against", default="transformers", help=f"some of {','.join(RIVALS)}")
    add("--sizes", choices=tuple(SIZES), help="of the models (middle; on a GPU full)")
    add("--dtype", choices=("float32", "bfloat16"), help="(float32; on a GPU bfloat16)")
    add("--only", nargs="*", default=[], metavar="FIELD=VALUE", help="cases, as batch=32 beams=1")
    add("--repeats", type=int, default=3, help="calls of each side (%(default)s)")
    add("--warm_up", type=int, default=1, help="calls before them (%(default)s)")
    add("--budget", type=float, default=1e9, help="seconds after which no case is begun")
    add("--resume", action="store_true", help="skips cases that the results file has")
    add("--out", type=pathlib.Path, help="JSON file (benchmarks/results/SUITE_DEVICE.json)")
    input_pipeline.add_flags(parser)
    flags = parser.parse_args()
    gpu = flags.device == "gpu"
    flags.sizes = flags.sizes or ("full" if gpu else "middle")
    flags.dtype = flags.dtype or ("bfloat16" if gpu else "float32")
    if flags.suite == "convert" and flags.dtype != "float32":
        parser.error("--suite convert reads a folder of float32 weights: give --dtype float32")
    flags.out = flags.out or RESULTS / f"{flags.suite}_{flags.device}.json"
    return flags


if __name__ == "__main__":
    sys.exit(main())
