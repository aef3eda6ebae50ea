"""Benchmarks with one model: answers, scores, `results.json` and the report.

Several processes answer together: each its share of the questions, on devices of its own, and
process 0 puts the rows together. Where the weights are split over the processes, all of them answer
all questions in step, and process 0 alone writes.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jax_instructblip.data.progress import Progress
from jax_instructblip.evaluation import benchmark_report, given, scoring, units
from jax_instructblip.evaluation.answering import Share, answer, count_left
from jax_instructblip.evaluation.benchmarks import paper_model
from jax_instructblip.evaluation.stored import Row, Store, check_ids
from jax_instructblip.evaluation.task import Task, check_choices
from jax_instructblip.folders import write_file
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.parallel.distributed import agree

PREDICTIONS, RESULTS = "predictions", "results.json"
REPORTS = ("report.html", "report.md")

Say = Callable[[str], None]


class Finished(NamedTuple):
    """A task with what came of it."""

    task: Task
    rows: list[Row]
    result: dict[str, Any]


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
) -> list[Finished]:
    """What came of every task; empty in all processes but the first.

    Args:
      blip: the model, on this process's devices or on a mesh of all.
      tasks: what to ask, in this order.
      out: folder of predictions, on a disk that all processes share; finished ones are taken up.
      model: what stands for it: `checkpoint`, `weights` (a digest), `dtype`.
      size: questions that a device answers at once.
      limit: of records a dataset, as the tasks were opened with.
      full: whether captions are scored by what only Java computes, too.
      say: where lines about what is going on go, of process 0.

    Raises:
      ValueError: records that cannot be asked at all, or predictions in `out` of something else.
    """
    process = jax.process_index()
    first, together = process == 0, blip.mesh is not None and blip.mesh.is_multi_process
    share = Share() if together else Share(process, jax.process_count())
    say = say if first else lambda line: None
    finished = []
    for task in tasks:
        name = task.benchmark.name
        line = Progress(len(task.records), f"reading {name}", "records", silent=not first)
        with agreed(), line:
            questions = units.plan(task, blip.text, size, line.update)
            check_choices(task, questions.records)
        facts = {**task.facts(), "batch_size": size, "limit": limit}
        stands = {"weights": model["weights"], "dtype": model["dtype"]}
        identity = {**facts, **stands, "questions": questions.digest}
        store = Store(out / PREDICTIONS, name, identity, process)
        done = _begin(store, first)
        say(describe(task, len(questions.records), len(done)))
        left = count_left(questions, done)
        total = left if together else -(-left // jax.process_count())
        line = Progress(total, f"{name}: answering", "questions", silent=not first)

        def take(rows: list[Row], line: Progress = line, store: Store = store) -> None:
            if first or not together:
                store.append(rows)
            line.update(len(rows))

        with line, agreed():
            answer(blip, task, questions, size=size, done=done, share=share, take=take)
        with agreed():
            if first:
                paper = paper_model(blip.variant)
                finished.append(_finish(task, questions, store, facts, full, paper))
                say(benchmark_report.line(name, finished[-1].result))
    return finished


def score_given(task: Task, path: Path, *, full: bool = True) -> Finished:
    """The scores of predictions that somebody has made already.

    Raises:
      MetricError: they are no answers, or not those of the task's records; all are listed.
    """
    rows = given.read_given(path)
    records = [task.light(number) for number in range(len(task.records))]
    check_ids(path, rows, [record.id for record in records], task.benchmark.name)
    ordered, notes = given.complete(task, path, rows, records)
    ordered, scores, reason = scoring.score(task, ordered, records, full=full)
    facts = {"dataset": task.benchmark.dataset, "split": task.split, "predictions": str(path)}
    result = scoring.summarise(task, ordered, scores, reason, facts, cut=0, model="")
    result["notes"] += notes
    return Finished(task, ordered, result)


def write(out: Path, finished: Sequence[Finished], model: Mapping[str, Any]) -> None:
    """Writes `results.json`, `report.html` and `report.md`."""
    out.mkdir(parents=True, exist_ok=True)
    results = {each.task.benchmark.name: each.result for each in finished}
    document = {"format": 1, **model, "datasets": results}
    write_file(out / RESULTS, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    samples = {each.task.benchmark.name: (each.task.opened, each.rows) for each in finished}
    page, text = (out / name for name in REPORTS)
    benchmark_report.write_html(page, model, results, samples)
    write_file(text, benchmark_report.markdown(model, results))


def describe(task: Task, count: int, done: int = 0) -> str:
    """What is going to be asked, and how, for people."""
    facts = task.facts()
    settings = ", ".join(f"{name} {value}" for name, value in facts["settings"].items())
    lines = [
        f"{task.benchmark.name} ({task.split}): {count} records"
        + (f", {done} answered already" if done else ""),
        f"  prompt: {facts['prompt']!r}",
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


def _finish(
    task: Task,
    questions: units.Questions,
    store: Store,
    facts: Mapping[str, Any],
    full: bool,
    paper: str,
) -> Finished:
    """Puts the rows of all processes together, and scores them."""
    found = store.rows()
    rows = [found[record.id] for record in questions.records]
    rows, scores, reason = scoring.score(task, rows, questions.records, full=full)
    store.finish(rows)
    result = scoring.summarise(task, rows, scores, reason, facts, cut=questions.cut, model=paper)
    return Finished(task, rows, result)


def _begin(store: Store, first: bool) -> dict[str, Row]:
    """What is answered already; every process has seen it when one goes on."""
    problem: Exception | None = None
    if first:
        try:
            store.begin()
        except (ValueError, OSError) as error:
            problem = error
    agree(problem)
    done: dict[str, Row] = {}
    try:
        done = store.rows()
    except (ValueError, OSError) as error:
        problem = error
    agree(problem)
    return done
