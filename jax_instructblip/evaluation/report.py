"""One HTML file about a run: loss, accuracies beside their baselines, images with their answers.

Self-contained: pictures and curves are inside it, so that it can be sent around.
"""

import html
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation import page
from jax_instructblip.evaluation.harness import Prediction

GRID = 24  # pictures shown of each split
COLUMNS = ("tuned", "before", "blind", "majority")
MEANING = {
    "tuned": "the model evaluated",
    "before": "the same model before it was tuned",
    "blind": "the model evaluated, shown black images",
    "majority": "the best constant answer of each family",
}


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    splits: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, Sequence[tuple[Record, Prediction]]],
    metrics: Sequence[Mapping[str, float]] = (),
    facts: Mapping[str, str] | None = None,
) -> None:
    """Writes the page.

    Args:
      path: of the HTML file.
      title: what was evaluated.
      splits: split -> {"count": n, "tasks": {family: {"count": n, "tuned": share, "blind": ...}},
        "mean": {"tuned": share, ...}}, as in `results.json`.
      samples: split -> records and their predictions, of which some are shown.
      metrics: lines of `metrics.jsonl`; with none there are no curves.
      facts: a table of names and values for the head of the page.
    """
    parts = [_facts(facts or {})]
    if any("loss" in line for line in metrics):
        parts += ["<h2>Training</h2>", _curves(metrics)]
    for split, scores in splits.items():
        parts += [f"<h2>{html.escape(split)}</h2>", _table(scores)]
        parts.append(_grid(samples.get(split, ())))
    page.write(path, title, parts)


def _facts(facts: Mapping[str, str]) -> str:
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    ]
    return f"<table class='note'>{''.join(rows)}</table>"


def _curves(metrics: Sequence[Mapping[str, float]]) -> str:
    figure = matplotlib.figure.Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    left.plot(*zip(*losses, strict=True), linewidth=1)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    name = "validation/accuracy"
    scores = [(line["step"], 100 * line[name]) for line in metrics if name in line]
    if scores:
        right.plot(*zip(*scores, strict=True), marker="o")
    right.set(xlabel="step", ylabel="validation accuracy, %", ylim=(0, 102))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return f"<img class='curve' alt='loss and accuracy' src='{page.inline(buffer.getvalue())}'>"


def _table(scores: Mapping[str, Any]) -> str:
    columns = [name for name in COLUMNS if name in scores["mean"]]
    head = "".join(f"<th title='{MEANING[name]}'>{name}</th>" for name in columns)
    rows = [_row(task, values, columns) for task, values in scores["tasks"].items()]
    rows.append(_row("mean of the families", {"count": scores["count"], **scores["mean"]}, columns))
    legend = "; ".join(f"{name}: {MEANING[name]}" for name in columns)
    return (
        f"<table><thead><tr><th>exact match of whole answers</th><th>questions</th>{head}<th></th>"
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table><p class='note'>{legend}.</p>"
    )


def _row(name: str, values: Mapping[str, Any], columns: Sequence[str]) -> str:
    cells = "".join(f"<td>{values[column]:.1%}</td>" for column in columns)
    bar = f"<span class='bar' style='width:{12 * values['tuned']:.2f}em'></span>"
    return (
        f"<tr><td>{html.escape(name)}</td><td>{values['count']}</td>{cells}"
        f"<td style='text-align:left'>{bar}</td></tr>"
    )


def _grid(samples: Sequence[tuple[Record, Prediction]]) -> str:
    count = min(GRID, len(samples))
    chosen = [samples[index * len(samples) // count] for index in range(count)]
    return f"<div class='grid'>{''.join(_card(*each) for each in chosen)}</div>"


def _card(record: Record, prediction: Prediction) -> str:
    pictures = "".join(page.picture(source) for source in record.images[:1])
    frames = f" <i>({len(record.images)} frames)</i>" if len(record.images) > 1 else ""
    truth = " / ".join(dict.fromkeys(record.answers))
    given = prediction.problem or prediction.text
    return (
        f"<div class='card {'right' if prediction.correct else 'wrong'}'>{pictures}{frames}"
        f"<div><b>{html.escape(record.prompt)}</b></div>"
        f"<div>answer: {html.escape(given)}</div><div>truth: {html.escape(truth)}</div>"
        f"<div class='note'>{html.escape(prediction.task)}, log-probability "
        f"{prediction.logprob:.2f}</div></div>"
    )
