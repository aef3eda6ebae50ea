"""The report of several checkpoints: one table of all, and their answers side by side.

A way is a way of answering: "generate", "short" or "rank" (`beside.WAYS`). A `document` is the
content of the `results.json` that `evaluation/beside.py` writes: results by dataset, way and model.
"""

import html
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_instructblip.evaluation.families import MAJORITY
from jax_instructblip.evaluation.predictions import Prediction
from jax_instructblip.evaluation.reports import page
from jax_instructblip.evaluation.suite import Finished

SHOWN = 12  # most questions of a dataset whose answers are shown
NOTE = (
    "All models are asked with the same images, prompts and candidates. Values are in percent, "
    "± their standard error."
)
SHOWN_NOTE = (
    "Some of the questions with the answers of every model, in each way; behind the way the score "
    "of the answer, from 0 to 1."
)
CONSTANT = "constant"
BY_FAMILY = (
    f"accuracy in percent by family of questions ({CONSTANT}: the best that one answer to all "
    "questions of a family reaches)"
)

Answered = Mapping[str, Mapping[tuple[str, str], Finished]]  # dataset -> (way, model) -> answers


def table(document: Mapping[str, Any]) -> page.Table:
    """Returns head and rows of the table: a row for each dataset in each way of answering it.

    After dataset, way, metric and number of records, each model has a column with its score in
    percent.
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


def family_table(by_way: Mapping[str, Any], models: Sequence[str]) -> page.Table | None:
    """Returns head and rows of a dataset's table by family; None if it is not scored by family.

    `by_way` is the dataset's part of `document["datasets"]`, by way and model. A row is a family
    answered in one way. The last column is the best constant answer's.
    """
    rows = []
    for way, by_model in by_way.items():
        some = next(iter(by_model.values()))
        for family, count in some.get("families", {}).items():
            name = f"accuracy/{family}"
            values = [_share(by_model[model]["values"], name) for model in models]
            constant = _share(some["baselines"].get(MAJORITY, {}), name)
            rows.append([family, way, str(count), *values, constant])
    rows.sort(key=lambda row: row[0])  # the ways of a family together
    return (["family", "answered", "questions", *models, CONSTANT], rows) if rows else None


def _share(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.1f}" if name in values else "-"


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
    parts.append(f"- questions of: {document['data']}")
    parts += ["", *page.markdown_table(*table(document)), ""]
    parts += [f"- {text}" for text in _remarks(document)]
    for name, by_way in document["datasets"].items():
        if families := family_table(by_way, list(document["checkpoints"])):
            parts += ["", f"## {name}, {BY_FAMILY}", "", *page.markdown_table(*families)]
    return "\n".join(parts) + "\n"


def write_html(path: str | os.PathLike, document: Mapping[str, Any], answered: Answered) -> None:
    """Writes the page: the table, then questions of each dataset with the answers of all models.

    `answered` has the finished tasks by dataset, then by (way, model). Datasets whose answers are
    long (no metric compares them) come first.
    """
    facts = {**document["checkpoints"], "questions of": document["data"]}
    parts = [page.pairs(facts.items()), page.note(NOTE)]
    parts += [page.table(*table(document)), page.note("", _remarks(document))]
    models = list(document["checkpoints"])
    for name, runs in sorted(answered.items(), key=lambda item: bool(_metric(item[1]))):
        parts.append(page.heading(name))
        if families := family_table(document["datasets"][name], models):
            parts += [page.note(f"{BY_FAMILY[0].upper()}{BY_FAMILY[1:]}:"), page.table(*families)]
        parts += [page.note(SHOWN_NOTE), _side_by_side(runs, models)]
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
                f"be asked, and count as wrong; the first is {entry['problems'][0]}"
                for model, entry in by_model.items()
                if entry["problems"]
            ]
    return found


def _remarks(document: Mapping[str, Any]) -> list[str]:
    """Returns the meaning of each way with its prompts, and the shortcomings."""
    used: dict[str, dict[str, list[str]]] = {}
    for name, by_way in document["datasets"].items():
        for way, by_model in by_way.items():
            prompt = next(iter(by_model.values()))["prompt"]
            used.setdefault(way, {}).setdefault(prompt, []).append(name)
    ways = [
        f"{way}: {document['ways'][way]}; "
        + ", ".join(f"{', '.join(names)} by the prompt {p!r}" for p, names in prompts.items())
        for way, prompts in used.items()
    ]
    return [*ways, *shortcomings(document)]


def _side_by_side(runs: Mapping[tuple[str, str], Finished], models: list[str]) -> str:
    """Returns an HTML table: a row for each question, with its image; a column for each model.

    The questions are those of the way that asks the most; other ways may have asked some of them.
    """
    some = max(runs.values(), key=lambda finished: len(finished.rows))
    count = len(some.rows)
    shown = min(SHOWN, count)
    by_id = {run: {row.id: row for row in finished.rows} for run, finished in runs.items()}
    head = "".join(f"<th class='left'>{html.escape(each)}</th>" for each in ("question", *models))
    body = ""
    for index in range(shown):
        number = index * count // shown
        name = some.rows[number].id
        cells = [_question(some, number), *(_answers(by_id, model, name) for model in models)]
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


def _answers(
    by_id: Mapping[tuple[str, str], Mapping[str, Prediction]], model: str, question: str
) -> str:
    """Returns a model's answers to one question in all ways, as HTML."""
    cells = []
    for (way, name), rows in by_id.items():
        if name == model and question in rows:
            row = rows[question]
            score = "" if row.score is None else f" ({row.score:.2f})"
            answer = page.marked(f"{way}{score}", [(row.problem or row.text, False)])
            cells.append(f"<div>{answer}</div>")
    return "".join(cells)
