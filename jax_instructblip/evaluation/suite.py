"""Tasks with one model: answers, scores, `results.json` and the report.

Several processes answer together: each its share of the questions, on devices of its own, and
process 0 puts the rows together. Where the weights are split over the processes, all of them answer
all questions in step, and process 0 alone writes.
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
from jax_instructblip.evaluation import external_answers, families, grouping, scoring
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
KINDS = {BENCHMARKS: "benchmarks", FAMILIES: "accuracies by family"}  # what a run has measured
REPORTS = ("report.html", "report.md")

Say = Callable[[str], None]


class Finished(NamedTuple):
    """A task that was answered, and its result."""

    task: Task
    rows: list[Prediction]
    result: dict[str, Any]


class Destination(NamedTuple):
    """The place of answers, and what they are of: weights, dtype, questions at once, limit."""

    folder: Path
    weights: str
    dtype: str
    size: int
    limit: int
    replace: bool  # answers to something else that are there


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
    """The result of every task; empty in all processes but the first.

    Args:
      blip: the model, on this process's devices or on a mesh of all.
      tasks: what to ask, in this order.
      out: folder of predictions, on a disk that all processes share; finished ones are taken up.
      model: what stands for it: `checkpoint`, `weights` (a digest), `dtype`.
      size: questions that a device answers at once.
      limit: of records a dataset, as the tasks were opened with.
      full: whether captions are scored by what only Java computes, too.
      say: where lines about what is going on go, of process 0.
      baselines: what tasks of families are measured beside.
      replace: remove predictions in `out` of something else, instead of refusing them.

    Raises:
      ValueError: records that cannot be asked at all, or predictions in `out` of something else.
    """
    first = jax.process_index() == 0
    say = say if first else lambda line: None
    destination = Destination(
        out / PREDICTIONS, model["weights"], model["dtype"], size, limit, replace
    )
    finished = []
    for task in tasks:
        line = Progress(len(task.records), f"reading {task.name}", "records", silent=not first)
        with agreed(), line:
            questions = grouping.plan(task, blip.text, size, line.update)
            check_choices(task, questions.records)
        store = _ask(blip, task, questions, destination, task.name, say)
        baseline_stores = {}
        if task.protocol.metric == families.METRIC:
            for each in baselines:
                beside_it = destination._replace(folder=out / BASELINES, weights=each.weights)
                other = dataclasses.replace(task, black=each.black)
                name = f"{task.name}.{each.name}"
                baseline_stores[each.name] = _ask(each.blip, other, questions, beside_it, name, say)
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
    """The result of a task, for people."""
    if finished.task.protocol.metric == families.METRIC:
        return families.table(finished.task.name, finished.result)
    return report.line(finished.task.name, finished.result)


def score_given(task: Task, path: Path, *, full: bool = True) -> Finished:
    """The scores of predictions that somebody has made already.

    Raises:
      MetricError: they are no answers, or not those of the task's records; all are listed.
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
    """Writes the rows of answers that somebody has made, so that runs can be compared by them."""
    path = out / PREDICTIONS / f"{finished.task.name}.jsonl"
    if path.exists() and path.samefile(predictions):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(row.line() for row in finished.rows))
    path.with_suffix(".json").unlink(missing_ok=True)  # these rows were asked elsewhere


def write(
    out: Path,
    finished: Sequence[Finished],
    model: Mapping[str, Any],
    *,
    command: str = "",
    metrics: Sequence[Mapping[str, float]] = (),
    answers: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes `results.json`, `report.html` and `report.md`.

    `command` is what made them, `metrics` and `answers` are the lines of the run's `metrics.jsonl`
    and `answers.jsonl`, if there are.
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
    """Writes the results, says where the report is, and returns what is in `results.json`.

    `recorded` is what `write` takes besides. In all processes but the first nothing is done, and
    {} returned.
    """
    if jax.process_index():
        return {}
    write(out, finished, model, command=command, **(recorded or {}))
    print(f"report: {out / REPORTS[0]}")
    return read_json(out / RESULTS, dict, allow_nan=True)


def versions() -> dict[str, str]:
    """The versions of the programs that compute and score."""
    names = ("jax-instructblip", "jax", "jaxlib", "flax", "numpy", "transformers", "pycocoevalcap")
    installed = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def describe(task: Task, name: str, count: int, done: int = 0) -> str:
    """The task for people: what will be asked, and how."""
    facts = task.facts()
    settings = ", ".join(f"{name} {value}" for name, value in facts["settings"].items())
    lines = [
        f"{name} ({task.split}): {count} records" + (f", {done} answered already" if done else ""),
        f"  prompt: {facts['prompt']!r}" + (", black images" if task.black else ""),
        f"  {facts['mode']}: {settings}",
    ]
    if task.candidates:
        lines.append(f"  candidates: {len(task.candidates)}")
    return "\n".join(lines)


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A block that ends with an error in every process where it does so in one."""
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
    """Answers this process's share of the questions; returns the store of all answers."""
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
    """Puts the rows of all processes together, and scores them."""
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
    """The answers already there; every process has seen them when one goes on."""
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
