"""One HTML file about a run: loss, accuracies beside their baselines, images with their answers.

Self-contained: pictures and curves are inside it, so that it can be sent around.
"""

import html
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation import curves, page
from jax_instructblip.evaluation.families import Prediction

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
        parts += ["<h2>Training</h2>", curves.picture(metrics)]
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
