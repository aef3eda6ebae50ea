"""A plot of a comparison: how many times as fast this package is, by case and rival."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Writes a PNG with a bar for each case and rival; the line at 1 is the rival itself.

    `rows` are results of `sides.compare`; without ratios nothing is written.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    bars = [(_label(row, rival), ratio) for row in rows for rival, ratio in _ratios(row)]
    if not bars:
        return
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.35 * len(bars)), layout="constrained")
    places = range(len(bars))
    for offset, (name, label) in enumerate(
        {
            "times_as_fast": "by the clock",
            "times_as_fast_by_processor_seconds": "by processor time",
        }.items()
    ):
        values = [ratio[name] for _, ratio in bars]
        axes.barh([each + 0.4 * offset for each in places], values, 0.38, label=label)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([each + 0.2 for each in places], [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the rival")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _ratios(row: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    return list(row.get("ratios", {}).items())


def _label(row: Mapping[str, Any], rival: str) -> str:
    case = row["case"]
    names = ("variant", "batch", "beams", "candidates")
    words = [
        f"{name} {case[name]}" if name != "variant" else case[name]
        for name in names
        if name in case
    ]
    return f"{', '.join(words)} / {rival}"
