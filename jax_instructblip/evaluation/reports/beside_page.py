"""The report of several checkpoints: one table of all, and their answers side by side."""

import html
import os
from collections.abc import Iterator, Mapping
from typing import Any

from jax_instructblip.evaluation.reports import page
from jax_instructblip.evaluation.suite import Finished

SHOWN = 12  # most questions of a dataset whose answers are shown
NOTE = "All models are asked with the same images, prompts and candidates."

Answered = Mapping[str, Mapping[tuple[str, str], Finished]]  # dataset -> (way, model) -> answers


def table(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the table: a row for each dataset and way, a column a model.

    `document` is the content of `results.json`.
    """
    models = list(document["checkpoints"])
    rows = []
    for name, by_way in document["datasets"].items():
        for way, by_model in by_way.items():
            some = next(iter(by_model.values()))
            values = [_value(by_model.get(model)) for model in models]
            rows.append([name, way, some["metric"] or "-", str(some["count"]), *values])
    return ["dataset", "answered", "metric", "records", *models], rows


def _value(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    if entry["value"] is None:
        return "not scored"
    error = entry["standard_error"]
    return f"{entry['value']:.2f}" + ("" if error is None else f" ± {error:.2f}")


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of the table for printing, in columns."""
    head, rows = table(document)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def markdown(document: Mapping[str, Any]) -> str:
    """Returns the table and what its words mean as Markdown."""
    parts = ["# Models side by side", "", NOTE, ""]
    parts += [f"- {name}: {path}" for name, path in document["checkpoints"].items()]
    parts += ["", *page.markdown_table(*table(document)), ""]
    return "\n".join([*parts, *(f"- {text}" for text in _remarks(document))]) + "\n"


def write_html(path: str | os.PathLike, document: Mapping[str, Any], answered: Answered) -> None:
    """Writes the page: the table, then questions of each dataset with the answers of all models.

    Datasets whose answers are long (no metric compares them) come first.
    """
    parts = [page.pairs(document["checkpoints"].items()), page.note(NOTE)]
    parts += [page.table(*table(document)), page.note("", _remarks(document))]
    models = list(document["checkpoints"])
    for name, runs in sorted(answered.items(), key=lambda item: bool(_metric(item[1]))):
        parts += [page.heading(name), _side_by_side(runs, models)]
    page.write(path, "Models side by side", parts)


def _metric(runs: Mapping[tuple[str, str], Finished]) -> str:
    return next(iter(runs.values())).task.protocol.metric


def shortcomings(document: Mapping[str, Any]) -> list[str]:
    """Returns a line for each missing score, and for questions that could not be asked."""
    found = []
    for name, by_way in document["datasets"].items():
        for way, by_model in by_way.items():
            reasons: dict[str, list[str]] = {}
            for model, entry in by_model.items():
                if entry["unscored"]:
                    reasons.setdefault(entry["unscored"], []).append(model)
            for reason, models in reasons.items():
                whose = "" if len(models) == len(by_model) else f", {', '.join(models)}"
                found.append(f"{name}, {way}{whose}: NOT SCORED, {reason}")
            found += [
                f"{name}, {way}, {model}: {len(entry['problems'])} of {entry['count']} could not "
                "be asked, and count as wrong"
                for model, entry in by_model.items()
                if entry["problems"]
            ]
    return found


def _remarks(document: Mapping[str, Any]) -> list[str]:
    """Returns the meaning of each way with its prompts, and the shortcomings."""
    used: dict[str, dict[str, str]] = {}
    for name, by_way in document["datasets"].items():
        for way, by_model in by_way.items():
            used.setdefault(way, {})[name] = next(iter(by_model.values()))["prompt"]
    ways = [
        f"{way}: {document['ways'][way]}; "
        + ", ".join(f"{name} {prompt!r}" for name, prompt in prompts.items())
        for way, prompts in used.items()
    ]
    return [*ways, *shortcomings(document)]


def _side_by_side(runs: Mapping[tuple[str, str], Finished], models: list[str]) -> str:
    """Returns an HTML table: a row for each question, with its image; a column for each model."""
    some = next(iter(runs.values()))
    count = len(some.rows)
    shown = min(SHOWN, count)
    head = "".join(f"<th>{html.escape(each)}</th>" for each in ("question", *models))
    body = ""
    for index in range(shown):
        number = index * count // shown
        cells = [_question(some, number), *(_answers(runs, model, number) for model in models)]
        body += f"<tr>{''.join(f'<td class=left>{cell}</td>' for cell in cells)}</tr>"
    return f"<div class='wide'><table class='plain'><tr>{head}</tr>{body}</table></div>"


def _question(finished: Finished, number: int) -> str:
    row = finished.rows[number]
    try:
        images = finished.task.with_images(number).images[:1]
    except ValueError:  # its problem says why
        images = ()
    question = html.escape(finished.task.without_images(number).prompt)
    truth = f"<div class='note'>{html.escape(page.truth(row.answers))}</div>" if row.answers else ""
    return f"{''.join(map(page.picture, images))}<div>{question}</div>{truth}"


def _answers(runs: Mapping[tuple[str, str], Finished], model: str, number: int) -> str:
    """Returns a model's answers to one question in all ways, as HTML."""
    cells = []
    for (way, name), finished in runs.items():
        if name == model:
            row = finished.rows[number]
            score = "" if row.score is None else f" ({row.score:.2f})"
            answer = page.marked(f"{way}{score}", [(row.problem or row.text, False)])
            cells.append(f"<div>{answer}</div>")
    return "".join(cells)
