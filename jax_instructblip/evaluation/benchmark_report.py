"""The report about benchmarks: our numbers beside the paper's, settings, images with answers.

One HTML file that holds its pictures, and the same tables as Markdown.
"""

import html
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation import page
from jax_instructblip.evaluation.benchmarks import MODELS
from jax_instructblip.evaluation.scoring import COUNTS
from jax_instructblip.evaluation.stored import Row

SHOWN = 12  # pictures with a right answer, and as many with a wrong one, of each dataset
CANDIDATES = 5  # shown of a ranking
PROBLEMS = 10  # listed of each dataset
SHORT = dict(zip(MODELS, ("FlanT5-XL", "FlanT5-XXL", "Vicuna-7B", "Vicuna-13B"), strict=True))

Open = Callable[[int], Record]  # the record of a number, with its images
Samples = Mapping[str, tuple[Open, Sequence[Row]]]


def line(name: str, result: Mapping[str, Any]) -> str:
    """One line for people: the dataset, its value, the paper's."""
    if result["unscored"]:
        return f"{name}: NOT SCORED, {result['unscored']}"
    said = f"{name}: {result['metric']} {result['value']:.2f}"
    said += f" ({result['count']} records"
    said += f", {len(result['problems'])} could not be asked)" if result["problems"] else ")"
    if result["gap"] is not None:
        model = result["paper_model"]
        said += f", paper {result['paper'][model]:.1f} ({SHORT[model]}), gap {result['gap']:+.2f}"
    for value, reason in result["left_out"].items():
        said += f"\n  {value} is left out: {reason}"
    return said


def markdown(model: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of the report."""
    head, rows = _table(results)
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in model.items()), ""]
    lines += _markdown_table(head, rows)
    lines += ["", "Numbers of the paper (arXiv 2305.06500, table 1) are in percent, as ours."]
    for name, result in results.items():
        lines += ["", f"## {name}", ""]
        lines += [f"- {key}: {value}" for key, value in _facts(result)]
        if result["values"]:
            lines += ["", *_markdown_table(["metric", "value"], _values(result))]
        if result["problems"]:
            lines += ["", "Could not be asked:", ""]
            lines += [f"- {each}" for each in _problems(result)]
    return "\n".join(lines) + "\n"


def write_html(
    path: str | os.PathLike,
    model: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    samples: Samples,
) -> None:
    """Writes the page; `samples` has what opens the records of each dataset, with their rows."""
    head, rows = _table(results)
    parts = [_pairs(model.items()), _html_table(head, rows)]
    parts.append(
        "<p class='note'>Numbers of the paper (arXiv 2305.06500, table 1) are in percent, as ours. "
        "The gap is to the model of the same sizes.</p>"
    )
    for name, result in results.items():
        parts += [f"<h2>{html.escape(name)}</h2>", _pairs(_facts(result))]
        if result["values"]:
            parts.append(_html_table(["metric", "value"], _values(result)))
        if result["problems"]:
            listed = "".join(f"<li>{html.escape(each)}</li>" for each in _problems(result))
            parts.append(f"<p>Could not be asked:</p><ul class='note'>{listed}</ul>")
        parts.append(_grid(*samples[name]))
    page.write(path, "Evaluation", parts)


def _table(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["dataset", "split", "records", "metric", "ours", *SHORT.values(), "gap"]
    rows = []
    for name, result in results.items():
        paper = [result["paper"].get(model) for model in MODELS]
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
    """What a reader wants to know of a dataset."""
    facts = []
    if "settings" in result:
        settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
        facts += [("prompt", repr(result["prompt"])), (result["mode"], settings)]
        facts.append(("at once", f"{result['batch_size']} questions a device"))
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


def _values(result: Mapping[str, Any]) -> list[list[str]]:
    return [
        [name, f"{value:.0f}" if name in COUNTS[1:] else f"{value:.2f}"]
        for name, value in result["values"].items()
    ]


def _problems(result: Mapping[str, Any]) -> list[str]:
    more = len(result["problems"]) - PROBLEMS
    return result["problems"][:PROBLEMS] + ([f"and {more} more"] if more > 0 else [])


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in each) + " |" for each in lines]


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head_row = f"<thead><tr>{cells('th', head)}</tr></thead>"
    return f"<div class='wide'><table class='plain'>{head_row}<tbody>{body}</tbody></table></div>"


def _pairs(facts: Any) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td class='left'>{html.escape(str(value))}</td></tr>"
        for name, value in facts
    )
    return f"<table class='plain note'>{rows}</table>"


def _grid(opened: Open, rows: Sequence[Row]) -> str:
    """Pictures with right answers and with wrong ones, as many of both where there are."""
    scores = [row.score for row in rows if row.score is not None]
    # A caption is neither right nor wrong: there the better half stands for the right ones.
    bound = float(np.median(scores)) if scores and max(scores) > 1 else 0.5
    right = [n for n, row in enumerate(rows) if row.score is not None and row.score >= bound]
    wrong = [n for n, row in enumerate(rows) if row.score is None or row.score < bound]
    chosen = sorted(_spread(right) + _spread(wrong))
    cards = [_card(opened, n, rows[n], n in right) for n in chosen]
    return f"<div class='grid'>{''.join(cards)}</div>"


def _spread(numbers: Sequence[int]) -> list[int]:
    count = min(SHOWN, len(numbers))
    return [numbers[index * len(numbers) // count] for index in range(count)]


def _card(opened: Open, number: int, row: Row, right: bool) -> str:
    truth = " / ".join(dict.fromkeys(row.answers))
    try:
        images = opened(number).images
    except ValueError:  # its problem says why
        images = ()
    pictures = "".join(page.picture(source) for source in images[:1])
    frames = f" <i>({len(images)} frames)</i>" if len(images) > 1 else ""
    parts = [f"<div><b>{html.escape(row.prompt)}</b></div>"]
    parts.append(f"<div>answer: {html.escape(row.problem or row.text)}</div>")
    parts.append(f"<div>truth: {html.escape(truth or '(not public)')}</div>")
    if row.scores:
        best = np.argsort(-np.asarray(row.scores), kind="stable")[:CANDIDATES]
        shown = ", ".join(f"{row.candidates[place]} {row.scores[place]:.2f}" for place in best)
        parts.append(f"<div class='note'>{html.escape(shown)}</div>")
    score = "" if row.score is None else f", score {row.score:.2f}"
    chance = "" if row.logprob is None else f", log-probability {row.logprob:.2f}"
    parts.append(f"<div class='note'>{html.escape(row.id)}{score}{chance}</div>")
    kind = "" if row.score is None else "right" if right else "wrong"
    return f"<div class='card {kind}'>{pictures}{frames}{''.join(parts)}</div>"
