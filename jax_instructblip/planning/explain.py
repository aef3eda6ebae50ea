"""The explanation of a plan's memory and traffic: the largest arrays that it makes, its copies."""

from collections.abc import Iterator, Mapping
from typing import Any

from jax_instructblip.planning.traffic import Kernel, Traffic, copies

MIB = 2**20
LISTED = 12  # arrays, and copies


def explain(traffic: Traffic) -> dict[str, Any]:
    """The `arrays` that are largest and the `copies` that read most in a step, as plain values.

    Each is a list of at most `LISTED` dicts with `bytes`, and `times`, `kind`, `shape`, `where` as
    in `Kernel`; those of copies have its `copies` and `source` too. The `bytes` of an array are
    those of the result, the `bytes` of a copy those that are read each time.
    """
    rows = copies(traffic.kernels)[:LISTED]
    return {
        "arrays": [_row(each, each.made) for each in traffic.largest(LISTED)],
        "copies": [
            {**_row(each, each.read), "copies": each.copies, "source": each.source} for each in rows
        ],
    }


def _row(kernel: Kernel, size: int) -> dict[str, Any]:
    shown = {"kind": kernel.kind, "shape": kernel.shape, "where": kernel.where}
    return {"bytes": size, "times": kernel.times, **shown}


def explain_lines(explained: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines that `plan --explain` prints for what `explain` returns."""
    yield "largest arrays that are made, MiB"
    for each in explained["arrays"]:
        yield _line(each, each["kind"])
    yield "copies that read most in a step, MiB each time" if explained["copies"] else "no copies"
    for each in explained["copies"]:
        yield _line(each, each["copies"], of=each["source"])


def _line(row: Mapping[str, Any], what: str, of: str = "") -> str:
    shape = row["shape"].partition("{")[0]
    where = of or row["where"][-60:]
    return f"  {row['bytes'] / MIB:10.1f} x {row['times']:<6,} {what:16} {shape[:44]:44} {where}"
