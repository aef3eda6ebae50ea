"""Evaluates tasks with one model: answers, scores, `results.json` and the report.

Several processes share the questions: each answers its part on its own devices, and process 0 joins
the rows. If the weights are split over the processes, all of them answer all questions in step, and
only process 0 writes.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jax_instructblip.atomic import write_file
from jax_instructblip.evaluation import (
    external_answers,
    families,
    grouping,
    judged_answers,
    scoring,
)
from jax_instructblip.evaluation.answering import Share, answer, count_left
from jax_instructblip.evaluation.families import Baseline
from jax_instructblip.evaluation.metrics.metric import Scores
from jax_instructblip.evaluation.predictions import Prediction, Store, check_ids
from jax_instructblip.evaluation.protocol import paper_model
from jax_instructblip.evaluation.reports import report
from jax_instructblip.evaluation.task import Task, check_choices
from jax_instructblip.files import read_json
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.parallel.cluster import agree
from jax_instructblip.progress import Progress

PREDICTIONS, BASELINES, RESULTS = "predictions", "baselines", "results.json"
FORMAT = 2  # of RESULTS
BENCHMARKS, FAMILIES = "benchmarks", "families"
KINDS = {BENCHMARKS: "benchmarks", FAMILIES: "accuracies by family"}  # kinds of evaluations
REPORTS = ("report.html", "report.md")

Say = Callable[[str], None]


class Finished(NamedTuple):
    """A finished task: its prediction rows, and its entry in `results.json`."""

    task: Task
    rows: list[Prediction]
    result: dict[str, Any]


class Destination(NamedTuple):
    """The folder that answers are written to, and the facts that identify them.

    Attributes:
      folder: the folder of the prediction files.
      weights: a digest of the model's weights.
      dtype: the dtype that the model computes in.
      size: questions per device answered at once.
      limit: number of records per dataset; 0: all.
      replace: delete answers with other facts instead of refusing them.
    """

    folder: Path
    weights: str
    dtype: str
    size: int
    limit: int
    replace: bool


def run(
    blip: InstructBlipPipeline,
    tasks: Sequence[Task],
    out: Path,
    *,
    model: Mapping[str, Any],
    size: int,
    limit: int = 0,
    full: bool = True,
    say: Say = print,
    baselines: Sequence[Baseline] = (),
    replace: bool = False,
) -> list[Finished]:
    """Answers and scores every task; returns the results ([] on processes other than 0).

    Args:
      blip: the model, on this process's devices or on a mesh of all processes.
      tasks: the tasks, in this order.
      out: the output folder, on a disk that all processes share; finished or partial answers
        there are reused.
      model: facts that identify the model: `checkpoint`, `weights` (a digest), `dtype`.
      size: questions that each device answers at once.
      limit: the limit with which the tasks were opened, to be recorded.
      full: add METEOR and SPICE, which need Java, to caption scores.
      say: prints lines about the progress, on process 0.
      baselines: other ways to answer tasks that are scored by family of questions.
      replace: delete predictions in `out` that were asked differently, instead of refusing them.

    Raises:
      ValueError: records without candidates to rank, or `out` has predictions that were asked
        differently.
    """
    first = jax.process_index() == 0
    say = say if first else lambda line: None
    destination = Destination(
        out / PREDICTIONS, model["weights"], model["dtype"], size, limit, replace
    )
    finished = []
    for each in tasks:
        task = each.for_input_format(blip.text.input_format)
        line = Progress(len(task.records), f"reading {task.name}", "records", silent=not first)
        with agreed(), line:
            questions = grouping.plan(task, blip.text, size, line.update)
            check_choices(task, questions.records)
        store = _ask(blip, task, questions, destination, task.name, say)
        baseline_stores = {}
        if task.protocol.metric == families.METRIC:
            for base in baselines:
                beside_it = destination._replace(folder=out / BASELINES, weights=base.weights)
                other = dataclasses.replace(task, black=base.black)
                name = f"{task.name}.{base.name}"
                baseline_stores[base.name] = _ask(base.blip, other, questions, beside_it, name, say)
        with agreed():
            if first:
                paper = paper_model(blip.variant)
                facts = {**task.facts(), "batch_size": size, "limit": limit}
                finished.append(
                    _finish(task, questions, store, baseline_stores, facts, full, paper)
                )
                say(describe_result(finished[-1]))
    return finished


def describe_result(finished: Finished) -> str:
    """Formats the result of a task for printing."""
    if finished.task.protocol.metric == families.METRIC:
        return families.table(finished.task.name, finished.result)
    return report.line(finished.task.name, finished.result)


def score_given(task: Task, path: Path, *, full: bool = True) -> Finished:
    """Scores the predictions in the file `path`, of one of the formats of `external_answers.py`.

    `full` adds METEOR and SPICE, which need Java, to the scores of captions.

    Raises:
      MetricError: the file has no answers, or not those of the task's records; all are listed.
    """
    rows = external_answers.read_given(path)
    records = [task.without_images(number) for number in range(len(task.records))]
    check_ids(path, rows, [record.id for record in records], task.name)
    ordered, notes = external_answers.complete(task, path, rows, records)
    ordered, scores, reason = scoring.score(task, ordered, records, full=full)
    facts = {"dataset": task.protocol.dataset, "split": task.split, "predictions": str(path)}
    result = scoring.summarise(task, ordered, scores, reason, facts, cut=0, model="")
    result["notes"] += notes
    return Finished(task, ordered, result)


def keep(out: Path, finished: Finished, predictions: Path) -> None:
    """Copies scored external answers to `out`, so that `compare` can read them.

    `predictions` is the file that they come from; if it is the copy itself, nothing is done.
    """
    path = out / PREDICTIONS / f"{finished.task.name}.jsonl"
    if path.exists() and path.samefile(predictions):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(row.line() for row in finished.rows))
    path.with_suffix(".json").unlink(missing_ok=True)  # facts of earlier rows: not those of these


def write(
    out: Path,
    finished: Sequence[Finished],
    model: Mapping[str, Any],
    *,
    command: str = "",
    metrics: Sequence[Mapping[str, float]] = (),
    answers: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes `results.json`, `report.html` and `report.md` to `out`, and answers for judges.

    Args:
      out: the output folder.
      finished: the finished tasks.
      model: facts that identify the model.
      command: the command line, to be recorded.
      metrics: lines of the training run's `metrics.jsonl`, for the curves.
      answers: lines of the training run's `answers.jsonl`.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = {each.task.name: each.result for each in finished}
    by_families = all(each.task.protocol.metric == families.METRIC for each in finished)
    document = {
        "format": FORMAT,
        "kind": FAMILIES if by_families else BENCHMARKS,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        **model,
        "datasets": results,
    }
    write_file(out / RESULTS, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    name = Path(str(model.get("checkpoint") or model.get("predictions") or "")).name
    for each in finished:
        if each.task.protocol.judged:
            judged_answers.write_answers(out, each.task, each.rows, name)
    samples = {each.task.name: (each.task.with_images, each.rows) for each in finished}
    page, text = (out / name for name in REPORTS)
    report.write_html(page, model, results, samples, metrics, answers)
    write_file(text, report.markdown(model, results))


def finish(
    out: Path,
    finished: Sequence[Finished],
    model: Mapping[str, Any],
    command: str = "",
    recorded: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the results and prints the report's path; returns the content of `results.json`.

    `recorded` has the arguments `metrics` and `answers` of `write`. Processes other than 0 do
    nothing and return {}.
    """
    if jax.process_index():
        return {}
    write(out, finished, model, command=command, **(recorded or {}))
    print(f"report: {out / REPORTS[0]}")
    return read_json(out / RESULTS, dict, allow_nan=True)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that compute and score, by name."""
    names = ("jax-instructblip", "jax", "jaxlib", "flax", "numpy", "transformers", "pycocoevalcap")
    installed = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def describe(task: Task, name: str, count: int, done: int = 0) -> str:
    """Formats for printing what a task asks, and how, under the heading `name`.

    `count` is the number of its records, of which `done` are already answered.
    """
    facts = task.facts()
    settings = ", ".join(f"{name} {value}" for name, value in facts["settings"].items())
    lines = [
        f"{name} ({task.split}): {count} records" + (f", {done} answered already" if done else ""),
        f"  prompt: {facts['prompt']!r}" + (", black images" if task.black else ""),
        f"  {facts['mode']}: {settings}",
    ]
    if task.chat:
        lines.append(f"  chat template: {task.chat['template']}")
    if task.candidates:
        lines.append(f"  candidates: {len(task.candidates)}")
    return "\n".join(lines)


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Context manager: if the block fails in one process, an error is raised in all processes."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    agree(problem)


def _ask(
    blip: InstructBlipPipeline,
    task: Task,
    questions: grouping.Questions,
    destination: Destination,
    name: str,
    say: Say,
) -> Store:
    """Answers this process's share of the questions; returns the store of all answers.

    `name` is the name of the store's files.
    """
    process = jax.process_index()
    first, together = process == 0, blip.mesh is not None and blip.mesh.is_multi_process
    share = Share() if together else Share(process, jax.process_count())
    facts = {**task.facts(), "batch_size": destination.size, "limit": destination.limit}
    stands = {
        "weights": destination.weights,
        "dtype": destination.dtype,
        "questions": questions.digest,
    }
    store = Store(destination.folder, name, {**facts, **stands}, process)
    done = begin_store(store, first, destination.replace)
    say(describe(task, name, len(questions.records), len(done)))
    left = count_left(questions, done)
    total = left if together else -(-left // jax.process_count())
    line = Progress(total, f"{name}: answering", "questions", compiles=True, silent=not first)

    def take(rows: list[Prediction]) -> None:
        if first or not together:
            store.append(rows)
        line.update(len(rows))

    with line, agreed():
        answer(blip, task, questions, size=destination.size, done=done, share=share, take=take)
    return store


def _finish(
    task: Task,
    questions: grouping.Questions,
    store: Store,
    baseline_stores: Mapping[str, Store],
    facts: Mapping[str, Any],
    full: bool,
    paper: str,
) -> Finished:
    """Joins the rows of all processes, scores them, and returns the task with its result.

    `facts` are copied into the result; `paper` is the paper's model of the same sizes, "" for none.
    """
    rows, scores, reason = _scored(task, questions, store, full)
    result = scoring.summarise(task, rows, scores, reason, facts, cut=questions.cut, model=paper)
    if questions.alike:
        note = f"{questions.alike} records have different candidates of the same tokens"
        result["notes"].append(note)
    if task.protocol.metric == families.METRIC:
        baselines = {families.MAJORITY: families.majority(questions.records)}
        for name, other in baseline_stores.items():
            _, baseline_scores, _ = _scored(task, questions, other, full)
            baselines[name] = dict(baseline_scores.values) if baseline_scores else {}
        result["families"] = families.counts(questions.records)
        result["baselines"] = {
            name: {each: 100 * value for each, value in values.items()}
            for name, values in baselines.items()
            if values
        }
    return Finished(task, rows, result)


def _scored(
    task: Task, questions: grouping.Questions, store: Store, full: bool
) -> tuple[list[Prediction], Scores | None, str]:
    by_id = store.rows()
    rows = [by_id[record.id] for record in questions.records]
    rows, scores, reason = scoring.score(task, rows, questions.records, full=full)
    store.finish(rows)
    return rows, scores, reason


def begin_store(store: Store, first: bool, replace: bool = False) -> dict[str, Prediction]:
    """Returns the rows already in the store, by id, after all processes have seen them.

    All processes call it; `first` is True in the one that prepares the store (`Store.begin`). With
    `replace`, rows that were made with other facts are deleted; without, they are an error.
    """
    problem: Exception | None = None
    if first:
        try:
            store.begin(replace=replace)
        except (ValueError, OSError) as error:
            problem = error
    agree(problem)
    done: dict[str, Prediction] = {}
    try:
        done = store.rows()
    except (ValueError, OSError) as error:
        problem = error
    agree(problem)
    return done
