"""Runs every GPU measurement, each in its own process, and writes one JSON file.

python benchmarks/gpu.py [--tiny] [--variants NAME ...] [--sides ours theirs numerics] [--out FILE]

Start it by `gpu.sh`. If a measurement fails, its error is recorded and the others still run.
"""

import argparse
import datetime
import json
import pathlib
import platform
import subprocess
import sys
import time

from benchmarks.workload import VARIANTS, Lengths, train_flops
from jax_instructblip.models.released import get_variant


def run(module: str, *flags: str, limit: int) -> dict:
    """Runs a benchmark module; returns the JSON that it prints last, or `{"error": ...}`.

    `limit` is in seconds; an error has the end of the module's output.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *flags]
    print(f"-- {' '.join(command[1:])}", flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {limit} s"}
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        result = {"error": (done.stderr or done.stdout)[-3000:]}
    return result | {"process_seconds": round(time.perf_counter() - start, 1)}


def table(results: list[dict]) -> str:
    """Formats the results as text: one line per measurement, this package next to transformers."""
    sides = {}
    for result in results:
        if "variant" in result and "error" not in result:
            sides.setdefault(result["variant"], {})[result["side"]] = result
    rows = [f"{'variant':26s} {'measure':28s} {'ours':>10s} {'theirs':>10s} {'ratio':>6s}"]
    for variant, side in sides.items():
        measures = {}
        for name, result in side.items():
            train = result["train"]
            if "batch" in train:
                key = "train, samples/s"
                measures.setdefault(key, {})[name] = train["samples_per_second"]
            for decode in result["decode"]:
                key = f"greedy batch {decode['batch']}, tokens/s"
                measures.setdefault(key, {})[name] = decode["tokens_per_second"]
        for key, found in measures.items():
            ours, theirs = found.get("jax_instructblip"), found.get("transformers")
            cells = [f"{x:10.1f}" if x else f"{'-':>10s}" for x in (ours, theirs)]
            ratio = f"{ours / theirs:6.2f}" if ours and theirs else f"{'-':>6s}"
            rows.append(f"{variant:26s} {key:28s} {cells[0]} {cells[1]} {ratio}")
    return "\n".join(rows)


def main() -> int:
    """Measures, prints and writes the results; returns 1 if any measurement failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a CPU")
    parser.add_argument("--variants", nargs="*", default=None)
    parser.add_argument("--sides", nargs="*", default=["numerics", "ours", "theirs"])
    parser.add_argument("--limit", type=int, default=420, help="seconds a process may take")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    flags = parser.parse_args()
    results, size = [], ["--repeats", str(flags.repeats)]
    size += ["--batch", "4", "--decode_batches", "1", "4"] if flags.tiny else []
    if "numerics" in flags.sides:
        results.append(run("numerics", limit=flags.limit))
    for variant in flags.variants or VARIANTS["tiny" if flags.tiny else "full"]:
        for side in ("ours", "theirs"):
            if side in flags.sides:
                results.append(run(side, "--variant", variant, *size, limit=flags.limit))
                if "error" in results[-1]:
                    results[-1] |= {"side": side, "variant": variant}
    document = {
        "command": "bash benchmarks/gpu.sh " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "sizes": {
            name: {
                "lengths": vars(Lengths.of(name)),
                "train_tflops_a_sample": train_flops(get_variant(name), Lengths.of(name)) / 1e12,
            }
            for name in sorted({result["variant"] for result in results if "variant" in result})
        },
        "results": results,
    }
    device = next((r["device"] for r in results if "device" in r), "unknown")
    label = device.lower().replace(" ", "_") + ("_tiny" if flags.tiny else "")
    out = flags.out or pathlib.Path(f"benchmarks/results/gpu_{label}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    failed = [result for result in results if "error" in result]
    for result in failed:
        print(f"FAILED {result.get('side')} {result.get('variant')}:\n{result['error']}")
    print(table(results))
    print(f"written to {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
