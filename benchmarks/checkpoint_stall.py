"""The time that saving checkpoints costs the training loop, at the quickstart's size.

python -m benchmarks.checkpoint_stall [--steps 300] [--every 50] [--out FILE]

Trains three times: without saves, with saves, without saves. The loop waits while the state is
copied (`checkpoint_share` of metrics.jsonl); the median of these waits is compared with a step. The
writing runs in the background and slows the steps down, which their times show.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from jax_instructblip.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOG_EVERY = 5  # steps per line of metrics


def run(folder: pathlib.Path, steps: int, every: int) -> list[dict[str, float]]:
    """Trains in a new process, with a save `every` steps; returns its lines of metrics.

    The lines of the first 20 steps and of the last one are left out.
    """
    fields = {
        "workdir": folder,
        "train.steps": steps,
        "train.log_every": LOG_EVERY,
        "checkpoints.every": every,
        "validation.path": "",
    }
    words = [f"--config.{name}={value}" for name, value in fields.items()]
    program = [sys.executable, "-m", "jax_instructblip", "train"]
    command = [*program, "--config", "configs/quickstart.py", *words]
    subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    return [line for line in read_metrics(folder) if 20 < line["step"] < steps]


def step_seconds(lines: list[dict[str, float]]) -> float:
    """Returns the mean seconds per step."""
    return statistics.mean(1 / line["steps_per_second"] for line in lines)


def measure(steps: int, every: int) -> dict[str, Any]:
    """Trains three times for `steps`, once with a save `every` steps; returns times and waits."""
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        bare = [run(folder / "before", steps, steps)]
        saving = run(folder / "saving", steps, every)
        bare.append(run(folder / "after", steps, steps))
        newest = max((folder / "saving" / "checkpoints").iterdir(), key=lambda path: path.name)
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    stalls = [
        line["checkpoint_share"] * LOG_EVERY / line["steps_per_second"]
        for line in saving
        if line["checkpoint_share"] > 0  # only lines that include a save
    ]
    plain, with_saves = statistics.mean(map(step_seconds, bare)), step_seconds(saving)
    stall = statistics.median(stalls)
    return {
        "steps": steps,
        "steps_between_saves": every,
        "checkpoint_bytes": size,
        "step_seconds_without_saves": [round(step_seconds(lines), 4) for lines in bare],
        "step_seconds_with_saves": round(with_saves, 4),
        "stall_seconds_of_a_save": [round(each, 4) for each in stalls],
        "stall_in_steps": round(stall / plain, 3),
        "stall_share_of_a_step_over_the_interval": round(stall / every / plain, 5),
        "slower_steps_cost_seconds_of_a_save": round((with_saves - plain) * every - stall, 3),
    }


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes the figures; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/checkpoint_stall.json"))
    flags = parser.parse_args(argv)
    result = {
        "command": " ".join(["python -m benchmarks.checkpoint_stall", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": importlib.metadata.version("jax"),
        **measure(flags.steps, flags.every),
    }
    text = json.dumps(result, indent=1)
    print(text)
    pathlib.Path(flags.out).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
