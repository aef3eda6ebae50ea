"""Measures two sides of a comparison, each in a process of its own, in alternation.

    benchmarks/run.py  <--lines of JSON-->  python -m benchmarks.sides SIDE CASE   one a side

A process builds its side of a case (weights, inputs, compiled programs), and then makes one call
for every line `call` that it reads; its answer has the times of the call. So neither side shares
memory, threads or a library with the other, and what else the machine does falls on both alike.

A case has JSON values: `suite` (a module here with `SIDES`), `device`, `dtype`, `work` (a folder),
`folder` (weights to read, if any), and the fields that the suite's `cases` gives, as `variant`.
"""

import contextlib
import importlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.workload import measure

ROOT = pathlib.Path(__file__).resolve().parents[1]
OURS = "jax_instructblip"

Case = dict[str, Any]  # JSON values: suite, variant, dtype, batch ...


class Built(NamedTuple):
    """One side of a case, ready to be timed.

    Attributes:
      call: the work that is timed; it blocks until its result is there, and returns values that are
        recorded, or compared with those of the other side.
      facts: whatever else is recorded of this side.
      peak: returns the bytes of the device's memory that the side took at its peak. None, also as
        its result: the memory of the process counts, as on a CPU.
    """

    call: Callable[[], Any]
    facts: Mapping[str, Any] = {}
    peak: Callable[[], int | None] | None = None


def serve(side: str, case: Case) -> None:
    """Builds a side, a key of the suite's `SIDES`; makes a call for each line of the input."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    say = lambda fields: print(json.dumps(fields), file=out, flush=True)
    built: Built = importlib.import_module(f"benchmarks.{case['suite']}").SIDES[side](case)
    say(dict(built.facts))
    for _ in sys.stdin:
        say(measure(built.call)._asdict())
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = built.peak() if built.peak else None
    say({"peak_gigabytes": round((own if peak is None else peak) / 1e9, 4)})


class Side:
    """A running process of one side."""

    def __init__(self, side: str, case: Case):
        """Starts the process and waits until it has built its side."""
        command = [sys.executable, "-m", "benchmarks.sides", side, json.dumps(case)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.name, self.log = side, pathlib.Path(case["work"], f"{side}.log")
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, text=True, cwd=ROOT, env=_environment(case), **{**pipes, "stderr": log}
            )
        try:
            self.facts = self._read()
        except BaseException:
            self.kill()
            raise

    def call(self) -> dict[str, Any]:
        """Makes one call; returns the fields of `workload.Measured`: its times, and its value."""
        self._write("call\n")
        return self._read()

    def close(self) -> dict[str, Any]:
        """Ends the process; returns its peak memory as `peak_gigabytes`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._read()

    def kill(self) -> None:
        """Ends the process at once, whatever it does, and closes its pipes."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # a line that the process did not read any more
                assert pipe is not None
                pipe.close()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            tail = self.log.read_text(errors="replace")[-2000:]
            code = self._process.returncode
            raise RuntimeError(f"{self.name} ended with {code}:\n{tail}")
        return json.loads(line)


def _environment(case: Case) -> dict[str, str]:
    """Returns the variables of a side; on a CPU no library loads what drives accelerators."""
    cpu = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **(cpu if case["device"] == "cpu" else {})}


def compare(case: Case, sides: Sequence[str], *, repeats: int, warm_up: int) -> dict[str, Any]:
    """Returns what `sides` took for a case, medians after a warm-up, and the ratios to ours.

    `sides` are keys of the suite's `SIDES`; each makes `warm_up` and then `repeats` calls. On a CPU
    the processes are there at once, and calls alternate. On a GPU one side runs after the other, so
    that each has all of its memory.
    """
    together = case["device"] == "cpu"
    found: dict[str, dict[str, Any]] = {}
    for group in [tuple(sides)] if together else [(side,) for side in sides]:
        running: list[Side] = []
        try:
            for side in group:
                running.append(Side(side, case))
            calls: dict[str, list[dict[str, Any]]] = {side.name: [] for side in running}
            for number in range(warm_up + repeats):
                for side in running[:: -1 if number % 2 else 1]:
                    calls[side.name].append(side.call())
            for side in running:
                taken = calls[side.name][warm_up:]
                found[side.name] = {**summary(taken, side.facts), **side.close()}
        finally:
            for side in running:
                side.kill()
    return {"case": shown(case), "sides": found, **ratios(found)}


def summary(calls: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the median times of calls, the last value, and the rate if `facts` has the `work`.

    `calls` are results of `Side.call`, `facts` those of the side.
    """
    middle = lambda name: statistics.median(each[name] for each in calls)
    fields: dict[str, Any] = {
        "seconds": round(middle("wall"), 5),
        "all_seconds": [round(each["wall"], 4) for each in calls],
        "processor_seconds": round(middle("own"), 4),
        "cores_of_other_processes": round(middle("others"), 2),
    }
    if work := facts.get("work"):
        fields["per_second"] = round(work / middle("wall"), 2)
    return fields | dict(facts) | {"value": calls[-1]["value"]}


def ratios(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns by rival how many times as fast ours is, and the share of its memory that ours takes.

    `found` has the `summary` of each side and its peak memory. Seconds are those of one unit of
    work, as sides may do different amounts of it. Their ratio is the median of the ratios of
    neighbouring calls, so that a load which comes and goes cancels out.
    """
    ours, rows = found[OURS], {}
    for name, theirs in found.items():
        if name == OURS:
            continue
        pairs = zip(theirs["all_seconds"], ours["all_seconds"], strict=True)
        scale = ours.get("work", 1) / theirs.get("work", 1)
        used = theirs["processor_seconds"] / max(ours["processor_seconds"], 1e-9)
        fields = {
            "times_as_fast": round(scale * statistics.median(a / b for a, b in pairs), 3),
            "times_as_fast_by_processor_seconds": round(scale * used, 3),
            "memory": round(ours["peak_gigabytes"] / theirs["peak_gigabytes"], 3),
        }
        rows[name] = fields | agreement(ours["value"], theirs["value"])
    return {"ratios": rows}


def agreement(ours: Any, theirs: Any) -> dict[str, Any]:
    """Returns how far the values of two sides agree: rows of ids, or numbers; {} for others."""
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        if ours and isinstance(ours[0], list):
            same = sum(a == b for a, b in zip(ours, theirs, strict=True))
            return {"same_answers": f"{same} of {len(ours)}"}
        difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        return {"largest_difference": difference}
    if isinstance(ours, float) and isinstance(theirs, float):
        return {"largest_difference": abs(ours - theirs)}
    return {}


def shown(case: Case) -> Case:
    """Returns the fields of a case that tell it from others, without this machine's paths."""
    return {name: value for name, value in case.items() if name not in ("work", "folder")}


def without_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of `compare` without the long values that were compared."""
    sides = {
        name: {key: value for key, value in fields.items() if key != "value"}
        for name, fields in row["sides"].items()
    }
    return {**row, "sides": sides}


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
