"""Accuracy of the quickstart: both language models, with and without instructions, several seeds.

python -m benchmarks.quickstart [--work DIR] [--seeds 0 1 2] [--limit 800] [--out FILE]

Finished runs in DIR are reused; others take about five minutes each. Prints a table and writes one
JSON file.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax

KINDS, SPLITS = ("llama", "t5"), ("test", "test_pairs", "test_families")
ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(
    folder: pathlib.Path,
    kind: str,
    aware: bool,
    seed: int,
    limit: int,
    others: Mapping[str, Any] | None = None,
    baselines: bool = True,
) -> dict[str, Any]:
    """Returns the `results.json` of a run, which is trained and evaluated first if missing.

    Args:
        folder: the run's workdir.
        kind: the language model, "llama" or "t5".
        aware: whether the Q-Former reads the instruction.
        seed: the run's seed; baselines are computed for seed 0 only.
        limit: number of questions per split.
        others: further config fields, by dotted name.
        baselines: False leaves them out for seed 0, too.
    """
    if not (folder / "results.json").is_file():
        program = [sys.executable, "-m", "jax_instructblip"]
        fields = {
            "workdir": folder,
            "model.checkpoint": f"shapes_{kind}",
            "model.instruction_aware": aware,
            "seed": seed,
            **(others or {}),
        }
        words = [f"--config.{name}={value}" for name, value in fields.items()]
        train = [*program, "train", "--config", "configs/quickstart.py", *words]
        measure = [*program, "evaluate", "--checkpoint", str(folder), "--limit", str(limit)]
        # Baselines do not depend on the seed.
        measure += ["--out", str(folder)] + ["--no_baselines"] * (seed != 0 or not baselines)
        for command in (train, measure):
            subprocess.run(command, check=True, cwd=ROOT)
    return json.loads((folder / "results.json").read_text())


def summary(work: pathlib.Path, seeds: list[int], limit: int) -> list[dict[str, Any]]:
    """Returns accuracies and baselines, one row per language model, instruction use and split."""
    rows = []
    for kind in KINDS:
        for aware in (True, False):
            found = [
                run(work / f"{kind}_{aware}_{seed}", kind, aware, seed, limit) for seed in seeds
            ]
            for split in SPLITS:
                measured = [each["datasets"][split] for each in found]
                tuned = [each["value"] / 100 for each in measured]
                baselines = {
                    name: values["accuracy"] / 100
                    for name, values in measured[0]["baselines"].items()
                }
                rows.append(
                    {
                        "llm": kind,
                        "instruction_aware": aware,
                        "split": split,
                        "questions": measured[0]["count"],
                        "tuned": tuned,
                        "tuned_mean": statistics.mean(tuned),
                        **baselines,
                    }
                )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows as a text table, in percent."""
    lines = [f"{'llm':6} {'aware':6} {'split':14} {'tuned':>24} {'mean':>6}  baselines"]
    for row in rows:
        tuned = " / ".join(f"{100 * value:.1f}" for value in row["tuned"])
        others = ", ".join(
            f"{name} {100 * row[name]:.1f}" for name in ("majority", "blind", "before")
        )
        lines.append(
            f"{row['llm']:6} {row['instruction_aware']!s:6} {row['split']:14} {tuned:>24} "
            f"{100 * row['tuned_mean']:6.1f}  {others}"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/benchmark"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=800, help="questions a split")
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "quickstart.json"
    )
    flags = parser.parse_args()
    rows = summary(flags.work.absolute(), flags.seeds, flags.limit)
    print(table(rows))
    document = {
        "command": f"python -m benchmarks.quickstart --seeds {' '.join(map(str, flags.seeds))}",
        "scoring": "exact match of whole answers, mean of the families of questions",
        "seeds": flags.seeds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "results": rows,
    }
    flags.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {flags.out}")


if __name__ == "__main__":
    main()
