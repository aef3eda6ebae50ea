"""Curves of a training run (loss, learning rate, norms, speed) as one image, and their page."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure

from jax_instructblip.evaluation.reports import page

# Of each panel: title, unit, names of the metrics drawn in it.
PANELS = (
    ("loss", "nats a token", ("loss",)),
    ("validation score", "share", ("validation/score",)),
    ("learning rate", "", ("learning_rate",)),
    ("norms", "", ("gradient_norm", "parameter_norm")),
    ("speed", "a second", ("samples_per_second", "tokens_per_second", "slots_per_second")),
    ("where the time goes", "share", ("device_share", "data_share", "checkpoint_share")),
    ("use of the peak", "share", ("model_flops_utilisation",)),
    ("padding", "share of token positions", ("padding_share",)),
    ("memory", "GB", ("memory_gb", "memory_peak_gb")),
)
LOGARITHMIC = ("loss", "norms")
COLUMNS = 2

# Title of a panel -> label of a run -> its lines, with `step` and metrics.
Panels = Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]


def picture(metrics: Sequence[Mapping[str, float]]) -> str:
    """Returns an HTML image with one panel per group of `PANELS` that `metrics` has numbers of.

    `metrics` are the lines of `metrics.jsonl`.
    """
    shown = [
        (title, unit, names)
        for title, unit, names in PANELS
        if any(name in line for line in metrics for name in names)
    ]
    figure, axes = _panels(len(shown))
    for axis, (title, unit, names) in zip(axes, shown, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in metrics if name in line]
            if points:
                few = len(points) <= 30
                label = name.rpartition("/")[2].replace("_", " ")
                axis.plot(*zip(*points, strict=True), lw=1, marker="." if few else "", label=label)
        axis.set(title=title, xlabel="step", ylabel=unit)
        if title in LOGARITHMIC:
            axis.set_yscale("log")
        elif title != "learning rate":
            axis.set_ylim(bottom=0)
        axis.legend(fontsize="small")
    return image(_png(figure))


def compared(panels: Panels, name: str) -> bytes:
    """Returns a PNG image with one panel per title, in which the metric `name` of runs is drawn.

    `panels` is {title: {label: lines}}; a line of a run is a dict with `step` and metrics.
    """
    figure, axes = _panels(len(panels))
    for axis, (title, runs) in zip(axes, panels.items(), strict=True):
        for label, metrics in runs.items():
            points = [(line["step"], line[name]) for line in metrics if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), lw=1, marker=".", label=label)
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend(fontsize="small")
    return _png(figure)


def _panels(count: int) -> tuple[matplotlib.figure.Figure, list[Any]]:
    """Returns a figure and the axes of its panels, `COLUMNS` a row, each with a grid."""
    rows = -(-count // COLUMNS)
    figure = matplotlib.figure.Figure(figsize=(10, 2.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(alpha=0.3)
    return figure, axes[:count]


def _png(figure: matplotlib.figure.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def image(png: bytes) -> str:
    """Returns an HTML image of curves from the bytes of a PNG file."""
    return f"<img class='curve' alt='curves' src='{page.inline(png)}'>"


def answers_table(answers: Sequence[Mapping[str, Any]]) -> str:
    """Returns an HTML table of validation questions: truth, and the model's answer at each step.

    `answers` are the lines of `answers.jsonl`.
    """
    steps = sorted({each["step"] for each in answers})
    texts = {(each["step"], each.get("id")): each.get("text", "") for each in answers}
    asked = {each.get("id"): each for each in answers}  # the latest row of each question
    head = ["question", "truth", *(f"step {step}" if step else "before" for step in steps)]
    rows = []
    for name, each in asked.items():
        truth = " / ".join(dict.fromkeys(each.get("answers", ())))
        rows.append([each.get("prompt", ""), truth, *(texts.get((s, name), "-") for s in steps)])
    return page.table(head, rows)


def write(
    path: str | os.PathLike,
    title: str,
    metrics: Sequence[Mapping[str, float]],
    answers: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes an HTML page of the curves and sample answers; no page if no loss has been logged.

    `metrics` are as in `picture`, `answers` as in `answers_table`.
    """
    if any("loss" in line for line in metrics):
        parts = [page.heading("Answers"), answers_table(answers)] if answers else []
        page.write(path, title, [picture(metrics), *parts])
