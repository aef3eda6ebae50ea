"""The report of an evaluation: our numbers next to the paper's, or per family next to baselines.

It is written as one self-contained HTML file, with pictures and training curves, and as Markdown.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation import families
from jax_instructblip.evaluation.predictions import Prediction
from jax_instructblip.evaluation.protocol import SHORT
from jax_instructblip.evaluation.reports import curves, page
from jax_instructblip.evaluation.scoring import is_count

SHOWN = 12  # most samples per dataset with a right answer, and with a wrong one
CANDIDATES = 5  # best candidates shown per sample of a ranking
PROBLEMS = 10  # most problems listed per dataset
PAPER = "Numbers of the papers (arXiv 2305.06500, table 1; 2301.12597, tables 2, 3 and 5) are in \
percent, as ours; the gap is to the model of the same sizes."

Open = Callable[[int], Record]  # record number -> record with its images
Samples = Mapping[str, tuple[Open, Sequence[Prediction]]]


def line(name: str, result: Mapping[str, Any]) -> str:
    """Formats the entry of dataset `name` in `results.json`: its value, and the paper's."""
    if result["unscored"]:
        return f"{name}: NOT SCORED, {result['unscored']}"
    said = f"{name}: {result['metric']} {result['value']:.2f}"
    counted = [f"{result['count']} records"]
    if result["standard_error"] is not None:
        counted.append(f"standard error {result['standard_error']:.2f}")
    if result["problems"]:
        counted.append(f"{len(result['problems'])} could not be asked")
    if shown := _shown(result):
        counted.append(shown)
    said += f" ({', '.join(counted)})"
    if result["gap"] is not None:
        model = result["paper_model"]
        said += f", paper {result['paper'][model]:.1f} ({SHORT[model]}), gap {result['gap']:+.2f}"
    for value, reason in result["left_out"].items():
        said += f"\n  {value} is left out: {reason}"
    return said


def markdown(model: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the report as Markdown tables.

    `model` has facts about the model, by name; `results` the entries of `results.json`, by dataset.
    """
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in model.items()), ""]
    if any(result["paper"] for result in results.values()):
        lines += [*page.markdown_table(*_table(results)), "", PAPER]
    for name, result in results.items():
        lines += ["", f"## {name}", ""]
        lines += [f"- {key}: {value}" for key, value in _facts(result)]
        for head, rows in _tables(result):
            lines += ["", *page.markdown_table(head, rows)]
        if result["problems"]:
            lines += ["", "Could not be asked:", ""]
            lines += [f"- {each}" for each in _problems(result)]
    return "\n".join(lines) + "\n"


def write_html(
    path: str | os.PathLike,
    model: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    samples: Samples,
    metrics: Sequence[Mapping[str, float]] = (),
    answers: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes the report as an HTML page.

    Args:
      path: the file to write.
      model: facts about the model, by name.
      results: the entries of `results.json`, by dataset.
      samples: for each dataset, a function from record number to record, and the predictions.
      metrics: lines of the run's `metrics.jsonl`; without them there are no curves.
      answers: lines of the run's `answers.jsonl`.
    """
    parts = [page.pairs(model.items())]
    if any(result["paper"] for result in results.values()):
        parts += [page.table(*_table(results)), page.note(PAPER)]
    if any("loss" in line for line in metrics):
        parts += [page.heading("Training"), curves.picture(metrics)]
        if answers:
            parts.append(curves.answers_table(answers))
    for name, result in results.items():
        parts += [page.heading(name), page.pairs(_facts(result))]
        parts += [page.table(head, rows) for head, rows in _tables(result)]
        if "families" in result and not result["unscored"]:
            (_, _, *columns), _ = families.by_family(result)
            parts.append(
                page.note("; ".join(f"{each}: {families.MEANING[each]}" for each in columns))
            )
        if result["problems"]:
            parts.append(page.note("Could not be asked:", _problems(result)))
        parts.append(_grid(*samples[name]))
    page.write(path, "Evaluation", parts)


def _tables(result: Mapping[str, Any]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yields (head, rows) of one dataset's tables: families with baselines, or all values."""
    if result["unscored"]:
        return
    if "families" in result:
        head, rows = families.by_family(result)
        yield head, [[row[0], str(row[1]), *(f"{share:.1%}" for share in row[2:])] for row in rows]
        return
    head, columns = ["metric", "value", "standard error"], [result["standard_errors"]]
    if published := result.get("paper_values"):
        head.append("paper")
        columns.append({result["metric"]: result["paper"][result["paper_model"]], **published})
    shown = lambda name: [f"{each[name]:.2f}" if name in each else "-" for each in columns]
    yield head, [[*each, *shown(each[0])] for each in _values(result)]


def _table(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    models = [name for name in SHORT if any(name in each["paper"] for each in results.values())]
    names = [SHORT[name] for name in models]
    head = ["dataset", "split", "records", "metric", "ours", *names, "gap"]
    rows = []
    for name, result in results.items():
        paper = [result["paper"].get(model) for model in models]
        value, gap = result["value"], result["gap"]
        rows.append(
            [
                *(name, result["split"], str(result["count"]), result["metric"] or "-"),
                "not scored" if value is None else f"{value:.1f}",
                *("-" if each is None else f"{each:.1f}" for each in paper),
                "-" if gap is None else f"{gap:+.1f}",
            ]
        )
    return head, rows


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (name, value) pairs about how a dataset was asked and scored."""
    facts = []
    if "settings" in result:
        settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
        if result["prompt"]:
            facts.append(("prompt", repr(result["prompt"])))
        unit = "pairs" if result["mode"] == "retrieved" else "questions"
        facts += [
            (result["mode"], settings),
            ("at once", f"{result['batch_size']} {unit} a device"),
        ]
    if shown := _shown(result):
        facts.append(("shown", shown))
    if "candidates" in result:
        facts.append(("candidates", str(result["candidates"]["count"])))
    if "predictions" in result:
        facts.append(("predictions", result["predictions"]))
    if result["unscored"]:
        facts.append(("not scored", result["unscored"]))
    facts += [(f"{name} is left out", reason) for name, reason in result["left_out"].items()]
    if cut := result["prompts_cut_for_the_qformer"]:
        facts.append(("cut", f"the Q-Former reads the end of {cut} prompts alone"))
    if result["problems"]:
        facts.append(("could not be asked", f"{len(result['problems'])}, which count as wrong"))
    return facts + [("note", note) for note in result["notes"]]


def _shown(result: Mapping[str, Any]) -> str:
    """Describes how texts and images were presented, where it is not the default; "" if it is."""
    style = result.get("style", {})
    words = [
        f"text processor {style['processor']}"
        if style.get("processor", "paper") != "paper"
        else "",
        f"dialogue {style['dialogue']}" if style.get("dialogue", "plain") != "plain" else "",
        f"image crop {result['crop']}" if "crop" in result else "",
        f"EXIF {result['exif']}" if "exif" in result else "",
    ]
    return ", ".join(filter(None, words))


def _values(result: Mapping[str, Any]) -> list[list[str]]:
    return [
        [name, f"{value:.0f}" if is_count(name) else f"{value:.2f}"]
        for name, value in result["values"].items()
    ]


def _problems(result: Mapping[str, Any]) -> list[str]:
    more = len(result["problems"]) - PROBLEMS
    return result["problems"][:PROBLEMS] + ([f"and {more} more"] if more > 0 else [])


def _grid(opened: Open, rows: Sequence[Prediction]) -> str:
    """Returns HTML cards of samples, up to `SHOWN` right answers and as many wrong ones."""
    scores = [row.score for row in rows if row.score is not None]
    # Captions are neither right nor wrong: the better half is shown as right.
    bound = float(np.median(scores)) if scores and max(scores) > 1 else 0.5
    right = [n for n, row in enumerate(rows) if row.score is not None and row.score >= bound]
    wrong = [n for n, row in enumerate(rows) if row.score is None or row.score < bound]
    chosen = sorted(_spread(right) + _spread(wrong))
    cards = [_card(opened, n, rows[n], n in right) for n in chosen]
    return page.grid(cards)


def _spread(numbers: Sequence[int]) -> list[int]:
    count = min(SHOWN, len(numbers))
    return [numbers[index * len(numbers) // count] for index in range(count)]


def _card(opened: Open, number: int, row: Prediction, right: bool) -> str:
    try:
        images = opened(number).images
    except ValueError:  # its problem says why
        images = ()
    lines = [f"answer: {row.problem or row.text}", page.truth(row.answers)]
    notes = []
    if row.scores:
        best = np.argsort(-np.asarray(row.scores), kind="stable")[:CANDIDATES]
        named = row.candidates or [str(index) for index in range(len(row.scores))]
        notes.append(", ".join(f"{named[index]} {row.scores[index]:.2f}" for index in best))
    score = "" if row.score is None else f", score {row.score:.2f}"
    chance = "" if row.logprob is None else f", log-probability {row.logprob:.2f}"
    notes.append(f"{row.id}{f', {row.task}' if row.task else ''}{score}{chance}")
    kind = "" if row.score is None else "right" if right else "wrong"
    return page.card(images, row.prompt, lines, notes, kind)
