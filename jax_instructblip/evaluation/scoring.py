"""Scores the prediction rows of a dataset, and summarises them for `results.json`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation import judged_answers
from jax_instructblip.evaluation.metrics.choice_scores import COUNTS, class_scores
from jax_instructblip.evaluation.metrics.dialogue_scores import score_ndcg
from jax_instructblip.evaluation.metrics.metric import Metric, MetricError, Response, Scores
from jax_instructblip.evaluation.metrics.table import get_metric
from jax_instructblip.evaluation.predictions import Prediction
from jax_instructblip.evaluation.task import Task

NO_METRIC = "nothing is scored: no metric belongs to this dataset"
JUDGED = "a judge compares its answers, which are in {}"
HIDDEN = "the right answers of this split are not public: hand in the predictions where they are"


def metric_of(task: Task, *, full: bool = False) -> tuple[str, Metric] | None:
    """Returns name and function of the task's metric; None if the task is not scored.

    `full` adds METEOR and SPICE to the caption metrics; they need Java and some minutes.
    """
    name = task.protocol.metric
    if not name:
        return None
    return name, get_metric("captions" if full and name == "cider" else name)


def score(
    task: Task, rows: Sequence[Prediction], records: Sequence[Record], *, full: bool = False
) -> tuple[list[Prediction], Scores | None, str]:
    """Returns the rows with their scores, the overall scores, and a reason.

    If the task cannot be scored, the scores are None and the reason says why; else it is "".
    Records without a public answer are excluded, with a note in the scores. `full` is as in
    `metric_of`.
    """
    metric = metric_of(task, full=full)
    if metric is None:
        judged = task.protocol.judged
        reason = JUDGED.format(judged_answers.file_of(task)) if judged else NO_METRIC
        return list(rows), None, reason
    by_id = {row.id: row for row in rows}
    scored = [record for record in records if is_known(record, metric[0])]
    if not scored:
        return list(rows), None, HIDDEN
    responses = [_response(task, by_id[record.id]) for record in scored]
    try:
        scores = metric[1](responses, scored)
        if task.relevance:
            more = score_ndcg(responses, scored, task.relevance)
            scores = dataclasses.replace(scores, values={**scores.values, **more.values})
    except MetricError as error:
        return list(rows), None, str(error)
    if len(scored) < len(records):
        note = f"{len(records) - len(scored)} of {len(records)} records have no public answer"
        scores = dataclasses.replace(scores, notes=(*scores.notes, note))
    main = next(iter(scores.values))
    each = scores.samples.get(main) or next(iter(scores.samples.values()), ())
    values = dict(zip((record.id for record in scored), each, strict=True)) if each else {}
    rows = [dataclasses.replace(row, score=values.get(row.id)) for row in rows]
    return rows, scores, ""


def percent(name: str, value: float) -> float:
    """Returns `value` in percent if the score `name` is a share; counts and ranks unchanged."""
    return value if name == "mean_rank" or is_count(name) else 100 * value


def is_count(name: str) -> bool:
    """Returns True if the value `name`, or `NAME/KIND`, is a whole number of records."""
    return name.partition("/")[0] in COUNTS


def summarise(
    task: Task,
    rows: Sequence[Prediction],
    scores: Scores | None,
    reason: str,
    facts: Mapping[str, Any],
    *,
    cut: int,
    model: str,
) -> dict[str, Any]:
    """Returns the task's entry in `results.json`, as plain JSON values; scores are in percent.

    `scores` and `reason` are those of `score`; `facts` are copied into the entry. `cut` is the
    number of prompts that are truncated for the Q-Former; `model` is the published model of the
    same sizes (`protocol.paper_model`), "" for none.
    """
    values = {} if scores is None else {k: percent(k, v) for k, v in scores.values.items()}
    errors = {} if scores is None else scores.standard_errors()
    main = next(iter(values), "")
    paper = dict(task.protocol.paper)
    notes = [*(scores.notes if scores else ()), *task.protocol.notes]
    return {
        **facts,
        "count": len(rows),
        "metric": main,
        "value": values.get(main),
        "standard_error": percent(main, errors[main]) if main in errors else None,
        "values": values,
        "standard_errors": {name: percent(name, value) for name, value in errors.items()},
        "unscored": reason,
        "judged": task.protocol.judged,
        "left_out": dict(scores.left_out) if scores else {},
        "paper": paper,
        "paper_model": model,
        "paper_values": dict(task.protocol.paper_values.get(model, {})),
        "gap": values[main] - paper[model] if main and model in paper else None,
        "prompts_cut_for_the_qformer": cut,
        "problems": [f"{row.id}: {row.problem}" for row in rows if row.problem],
        "notes": [note for note in notes if note],
    }


def is_known(record: Record, metric: str) -> bool:
    """Returns True if the record has a right answer of the kind that the metric needs.

    `metric` is a name in `METRICS`: some compare choices, the others texts.
    """
    by_choice = metric in ("accuracy", "auroc", "mrr", "science_qa")
    return record.correct >= 0 if by_choice else bool(record.answers)


def _response(task: Task, row: Prediction) -> Response:
    """Returns the part of a row that the metric reads."""
    if not task.protocol.ranking or task.candidates or row.problem:
        return Response(row.id, row.text)
    if task.protocol.words and len(row.scores) == sum(map(len, task.protocol.words)):
        return Response(row.id, row.text, class_scores(row.scores, task.protocol.words))
    return Response(row.id, row.text, row.scores)
