"""Compares two evaluations: the samples whose answers or scores differ."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jax_instructblip import stores
from jax_instructblip.evaluation import suite
from jax_instructblip.evaluation.metrics.metric import MetricError, listed
from jax_instructblip.evaluation.predictions import Prediction, read_rows
from jax_instructblip.files import read_json


class Comparison(NamedTuple):
    """Two prediction files of one dataset.

    Attributes:
      name: the dataset.
      same: number of records with equal answer, score and problem in both.
      differing: the other records, as (row of the first, row of the second).
    """

    name: str
    same: int
    differing: list[tuple[Prediction, Prediction]]


def compare(first: Path, second: Path) -> list[Comparison]:
    """Compares two files `predictions/NAME.jsonl`, or two output folders.

    Returns one comparison for the files; for folders, one for every dataset that both have.

    Raises:
      MetricError: they share no dataset, measure different things, or have different records (the
        ids are listed).
    """
    first, second = stores.input_path(first), stores.input_path(second)
    if first.is_file() and second.is_file():
        return [_compare(first.stem, first, second)]
    files = [_files(folder) for folder in (first, second)]
    kinds = [_kind(folder) for folder in (first, second)]
    if None not in kinds and kinds[0] != kinds[1]:
        what = [
            f"{suite.KINDS[kind]} ({', '.join(names)})"
            for kind, names in zip(kinds, files, strict=True)
            if kind is not None
        ]
        raise MetricError(
            f"{first} holds {what[0]}, {second} holds {what[1]}: only two runs that measured the "
            "same can be compared"
        )
    common = sorted(files[0].keys() & files[1].keys())
    if not common:
        raise MetricError(
            f"no dataset is in both: {first} has {', '.join(files[0])}, {second} has "
            f"{', '.join(files[1])}"
        )
    return [_compare(name, files[0][name], files[1][name]) for name in common]


def describe(first: Path, second: Path) -> Iterator[str]:
    """Yields printable lines that compare two evaluations; raises as `compare`."""
    labels = (f"A {first}", f"B {second}")
    for comparison in compare(first, second):
        yield from lines(comparison, labels)


def lines(comparison: Comparison, labels: tuple[str, str]) -> Iterator[str]:
    """Yields printable lines: counts, then each differing sample with both answers.

    `labels` stand before the answers of the first and of the second evaluation.
    """
    better = [_better(*pair) for pair in comparison.differing]
    differing, count = len(better), comparison.same + len(better)
    yield (
        f"{comparison.name}: {differing} of {count} samples differ; "
        f"{better.count(-1)} are better in A, {better.count(1)} in B"
    )
    width = max(map(len, labels))
    for first, second in comparison.differing:
        yield f"  {first.id}: {first.prompt!r}"
        if first.prompt != second.prompt:
            yield f"    asked in B: {second.prompt!r}"
        for label, row in zip(labels, (first, second), strict=True):
            score = "-" if row.score is None else f"{row.score:.2f}"
            yield f"    {label:{width}}  {score:>5}  {row.problem or row.text!r}"


def _files(folder: Path) -> dict[str, Path]:
    """Returns the prediction files of an output folder, by dataset name."""
    places = [folder / suite.PREDICTIONS, folder]
    files = next((list(each.glob("*.jsonl")) for each in places if each.is_dir()), [])
    if not files:
        raise MetricError(
            f"{folder} has no predictions: expected a folder that `evaluate --out` wrote, or two "
            "files of its predictions/"
        )
    return {path.stem: path for path in sorted(files)}


def _kind(folder: Path) -> str | None:
    """Returns the kind of evaluation in the folder, a key of `suite.KINDS`; None if unknown."""
    out = folder if (folder / suite.RESULTS).is_file() else folder.parent
    if not (out / suite.RESULTS).is_file():
        return None
    document = read_json(out / suite.RESULTS, dict)
    kind = document.get("kind")
    return kind if kind in suite.KINDS else None


def _compare(name: str, first: Path, second: Path) -> Comparison:
    rows = {row.id: row for row in read_rows(first)}
    others = {row.id: row for row in read_rows(second)}
    lacking = [each for each in rows if each not in others]
    strange = [each for each in others if each not in rows]
    if lacking or strange:
        problems = [
            listed(f"ids of {first} are not in {second}", lacking),
            listed(f"ids of {second} are not in {first}", strange),
        ]
        what = "; ".join(filter(None, problems))
        raise MetricError(f"{name}: the two runs are not of the same records: {what}")
    differing = [
        (row, others[key])
        for key, row in rows.items()
        if (row.text, row.score, row.problem)
        != (others[key].text, others[key].score, others[key].problem)
    ]
    return Comparison(name, len(rows) - len(differing), differing)


def _better(first: Prediction, second: Prediction) -> int:
    """Returns -1 if the first row has the higher score, 1 if the second has, 0 if equal."""
    one, two = first.score or 0.0, second.score or 0.0
    return (two > one) - (one > two)
