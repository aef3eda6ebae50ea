"""Measures several checkpoints beside each other: same images, prompts and candidates, one table.

OUT/WAY/MODEL/     the evaluation of one checkpoint in one way: results.json, predictions/
OUT/results.json   the results of all, by dataset, way and model
OUT/beside.html    their table, and answers side by side; beside.md is the table alone

A way is a way of answering, a key of `WAYS`: "generate", "short" (a short answer is asked for) or
"rank". Each dataset is answered in those that make sense for it. The prompt is that of
`--prompt`, or the benchmark's own for InstructBLIP; where answers are generated, without the words
at its end that ask for a short answer. Without benchmarks, records are asked their own prompts and
scored by family; those that have choices are ranked.
"""

import dataclasses
import datetime
import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

import jax

from jax_instructblip.atomic import write_file
from jax_instructblip.data.records import RecordSubset
from jax_instructblip.evaluation import suite
from jax_instructblip.evaluation.benchmarks import Model, benchmark_names, open_benchmarks
from jax_instructblip.evaluation.by_kind import get_benchmark
from jax_instructblip.evaluation.family_accuracies import open_families
from jax_instructblip.evaluation.llava_protocols import SHORT_ANSWER
from jax_instructblip.evaluation.metrics.table import RANKED
from jax_instructblip.evaluation.protocol import BENCHMARKS, Protocol
from jax_instructblip.evaluation.reports import beside_page
from jax_instructblip.evaluation.settings import Settings
from jax_instructblip.evaluation.suite import Finished
from jax_instructblip.evaluation.task import Task
from jax_instructblip.files import read_json
from jax_instructblip.remote import address_of

GENERATE, SHORT, RANK = "generate", "short", "rank"
WAYS = {
    GENERATE: "answers are generated",
    SHORT: f"the same, and the prompt ends with {SHORT_ANSWER!r}",
    RANK: "candidates are ranked, of the records that have some",
}
PAGES = ("beside.html", "beside.md")
KIND = "beside"
_QUESTION = BENCHMARKS["gqa"].prompt
_CUES = (" Short answer:", " Answer:")  # ends of prompts
_LONG = ("", "cider")  # metrics of answers that are no single word or phrase

Results = dict[str, dict[str, dict[str, Any]]]  # dataset -> way -> model -> entry


def answer_beside(settings: Settings, command: str = "") -> dict[str, Any]:
    """Answers and scores the datasets of `settings` with each checkpoint, in each way.

    The checkpoints are `settings.checkpoint` and `settings.beside`; `settings.out` is required.
    Returns the content of `results.json`, in which `command` is recorded; {} in all processes
    except process 0. What an interrupted run answered is used again.

    Raises:
      ValueError: a dataset or checkpoint cannot be evaluated.
      OSError: there is no checkpoint, or the output folder cannot be written.
    """
    assert settings.checkpoint is not None and settings.out is not None
    out, models, tasks = settings.out, {}, {}
    with suite.agreed():
        for name, checkpoint in _names([settings.checkpoint, *settings.beside]).items():
            models[name] = Model.of(checkpoint, settings)
            if not models[name].llm:
                raise ValueError(
                    f"--beside: {checkpoint} is a first stage of BLIP-2, which answers nothing: "
                    "measure it by itself"
                )
        for name, model in models.items():
            tasks[name] = open_ways(settings, model.llm)
        out.mkdir(parents=True, exist_ok=True)
    results: Results = {}
    answered: dict[str, dict[tuple[str, str], Finished]] = {}
    for name, model in models.items():
        blip, facts = model.load()
        for way, of_way in tasks[name].items():
            folder, sizes = out / way / name, {"size": model.size, "limit": settings.limit}
            finished = suite.run(blip, of_way, folder, model=facts, **sizes)
            suite.finish(folder, finished, facts, command)
            for each in finished:
                entry = {"checkpoint": model.checkpoint, **each.result}
                results.setdefault(each.task.name, {}).setdefault(way, {})[name] = entry
                answered.setdefault(each.task.name, {})[way, name] = each
        del blip  # before the next one is loaded
    if jax.process_index():
        return {}
    document = {
        "format": suite.FORMAT,
        "kind": KIND,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": suite.versions(),
        "checkpoints": {name: model.checkpoint for name, model in models.items()},
        "data": settings.data,
        "ways": WAYS,
        "datasets": results,
    }
    write_file(out / suite.RESULTS, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    page, text = (out / name for name in PAGES)
    beside_page.write_html(page, document, answered)
    write_file(text, beside_page.markdown(document))
    print("\n".join([*beside_page.lines(document), *beside_page.shortcomings(document)]))
    print(f"side by side: {page}")
    return read_json(out / suite.RESULTS, dict, allow_nan=True)


def open_ways(settings: Settings, llm: str) -> dict[str, list[Task]]:
    """Opens the datasets of `settings`; returns the tasks of each way, by its key in `WAYS`.

    `llm` is the kind of the language model (`variant.llm.kind`). `settings.mode` "rank" leaves out
    the ways that generate, "generate" the one that ranks.

    Raises:
      ValueError: lists unusable datasets, or settings that no dataset uses.
    """
    if not settings.datasets:
        return _family_ways(settings)
    names = benchmark_names(settings)
    plain = dataclasses.replace(settings, prompt=None, mode=None)
    rows = [
        (way, protocol)
        for name in names
        for way, protocol in _ways(get_benchmark(name), settings.prompt, settings.mode)
    ]
    tasks = open_benchmarks(plain, [protocol for _, protocol in rows], llm)
    by_way: dict[str, list[Task]] = {}
    for (way, _), task in zip(rows, tasks, strict=True):
        if way != RANK or _has_candidates(task):
            by_way.setdefault(way, []).append(task)
    lacking = set(names) - {task.name for of_way in by_way.values() for task in of_way}
    if lacking:
        raise ValueError(
            f"{', '.join(sorted(lacking))} cannot be answered with --mode {settings.mode}: leave "
            "it out"
        )
    return by_way


def _family_ways(settings: Settings) -> dict[str, list[Task]]:
    """Returns the tasks of each way, for the splits of `settings.data`, scored by family."""
    assert settings.data is not None
    by_way: dict[str, list[Task]] = {}
    for task in open_families(settings, settings.data):
        for way, protocol in _ways(task.protocol, settings.prompt, settings.mode):
            protocol = protocol.override(settings.overrides())
            fields = {"protocol": protocol, "settings": protocol.settings()}
            if way == RANK:
                numbers = [n for n in range(len(task.records)) if task.without_images(n).choices]
                fields["records"] = RecordSubset(task.records, numbers)
            asked = dataclasses.replace(task, **fields)
            if len(asked.records):
                by_way.setdefault(way, []).append(asked)
    if not by_way:
        raise ValueError(
            f"{settings.data} cannot be answered with --mode {settings.mode}: no record has "
            "`choices`. Leave --mode out"
        )
    return by_way


def _ways(protocol: Protocol, prompt: str | None, mode: str | None) -> list[tuple[str, Protocol]]:
    """Returns (way, protocol) for each way in which a benchmark may be answered."""
    bare = _without_cue(protocol.prompt) if prompt is None else prompt
    ways = []
    if mode != "rank" and protocol.metric not in RANKED:
        ways.append((GENERATE, bare, False))
        if protocol.metric not in _LONG:
            ways.append((SHORT, f"{bare}\n{SHORT_ANSWER}", False))
    if mode != "generate":
        ways.append((RANK, protocol.prompt if prompt is None else prompt, True))
    return [
        (way, dataclasses.replace(protocol, prompt=text, prompts={}, ranking=ranking))
        for way, text, ranking in ways
    ]


def _without_cue(prompt: str) -> str:
    """Returns the prompt without the cue at its end; of a bare question, the question alone."""
    if prompt == _QUESTION:
        return "{question}"
    for cue in _CUES:
        prompt = prompt.removesuffix(cue)
    return prompt


def _has_candidates(task: Task) -> bool:
    return bool(task.protocol.words or task.candidates or task.without_images(0).choices)


def _names(checkpoints: Sequence[str]) -> dict[str, str]:
    """Returns each checkpoint by a name of its own: the last part of its path, numbered if used.

    `..` and `.` of a local path are resolved: the names are those of folders.
    """
    named: dict[str, str] = {}
    for checkpoint in checkpoints:
        place = checkpoint if address_of(checkpoint) else os.path.abspath(checkpoint)
        stem = os.path.basename(place.rstrip("/")) or "model"
        names = (f"{stem}-{n}" if n > 1 else stem for n in itertools.count(1))
        named[next(name for name in names if name not in named)] = checkpoint
    return named
