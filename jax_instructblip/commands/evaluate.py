"""Measures a model on benchmarks beside the paper's numbers, or by task family on `shapes`.

evaluate --checkpoint DIR --datasets gqa,vsr --data DIR --out DIR   benchmarks, by their protocols
evaluate --datasets gqa --predictions FILE --data DIR --out DIR     scores of answers made before
evaluate --compare A B                                              where two runs differ
evaluate --list                                                     datasets, prompts, settings
evaluate --checkpoint RUN                                           exact match by task family

`--datasets held_out` is all 13 of table 1. DIR of --data is what `jax-instructblip prepare` wrote,
or the files as they were downloaded. A run that was ended goes on where it stopped; datasets that
are finished are not answered again. Several processes share the work.
"""

import argparse
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_instructblip.commands.flags import check_flags
from jax_instructblip.data.shapes.dataset import DATASETS
from jax_instructblip.data.sources import open_records
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.evaluation import compare, families, suite
from jax_instructblip.evaluation.metrics.dialogue_scores import read_relevance
from jax_instructblip.evaluation.placement import choose_mesh
from jax_instructblip.evaluation.protocol import BENCHMARKS, HELD_OUT, get_benchmark, table
from jax_instructblip.evaluation.task import Task, open_task
from jax_instructblip.files import read_json, read_lines
from jax_instructblip.inference.generation_config import GenerationConfig, add_flags
from jax_instructblip.inference.loading import DTYPES, read_source, weights_digest
from jax_instructblip.inference.pipeline import InstructBlipPipeline, load
from jax_instructblip.parallel import cluster
from jax_instructblip.training.initial import read_start
from jax_instructblip.training.metrics import read_answers, read_metrics

_DECODING = (
    *("num_beams", "length_penalty", "repetition_penalty", "max_new_tokens", "min_new_tokens"),
    "length_rule",
)
_OVERRIDES = (*_DECODING, "length_normalise")
_LINES = (".jsonl", ".json")  # whose images are files of their own
_FAMILIES_BATCH, _DATASETS_BATCH = 64, 8  # questions answered at once


def main(argv: list[str]) -> int:
    """Prints results and writes them; returns 1 where a dataset could not be scored."""
    parser = _parser()
    args = parser.parse_args(argv)
    check_flags(args)
    _refuse_ignored(args, {name for name in vars(args) if not _is_default(parser, args, name)})
    if args.list:
        print(table())
        return 0
    if args.compare:
        return _compare(*args.compare)
    command = shlex.join(["jax-instructblip", "evaluate", *argv])
    if not args.datasets:
        return _families(args, command)
    if lacking := [name for name in ("data", "out") if getattr(args, name) is None]:
        raise ValueError(f"{' and '.join(f'--{name}' for name in lacking)}: needed by --datasets")
    if args.predictions:
        return _score(args, command)
    if not args.checkpoint:
        raise ValueError("--checkpoint: needed, or --predictions of answers made before")
    with cluster.joined(*cluster.read_flags(args)):
        return _benchmarks(args, command)


def _benchmarks(args: argparse.Namespace, command: str) -> int:
    """Answers and scores the datasets of the flags."""
    with suite.agreed():
        source = read_source(args.checkpoint)
        tasks = _tasks(args, source.variant.llm.kind)
        dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        mesh = choose_mesh(source.variant, dtype, fsdp=args.fsdp, tensor=args.tensor)
        args.out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written: now
    with suite.agreed():
        blip = load(args.checkpoint, mesh=mesh, dtype=dtype)
        blip.silent = True  # the suite says how far it is
    weights = weights_digest(source)
    model = {"checkpoint": str(args.checkpoint), "weights": weights, "dtype": dtype}
    finished = suite.run(
        blip,
        tasks,
        args.out,
        model=model,
        size=_DATASETS_BATCH if args.batch_size is None else args.batch_size,
        limit=args.limit,
    )
    if jax.process_index():
        return 0
    return _finish(args.out, finished, model, command)


def _score(args: argparse.Namespace, command: str) -> int:
    """Scores answers that were made before, by whatever program."""
    tasks = _tasks(args, "t5")
    if len(tasks) != 1:
        raise ValueError(f"--predictions is of one dataset, --datasets names {len(tasks)}")
    finished = suite.score_given(tasks[0], args.predictions)
    print("\n  ".join([suite.describe_result(finished), *finished.result["notes"]]))
    suite.keep(args.out, finished, args.predictions)
    return _finish(args.out, [finished], {"predictions": str(args.predictions)}, command)


def _finish(
    out: Path,
    finished: Sequence[suite.Finished],
    model: dict[str, Any],
    command: str,
    metrics: Sequence[Mapping[str, float]] = (),
    answers: Sequence[Mapping[str, Any]] = (),
) -> int:
    suite.write(out, finished, model, command=command, metrics=metrics, answers=answers)
    print(f"report: {out / suite.REPORTS[0]}")
    return int(any(each.result["unscored"] for each in finished))


def _tasks(args: argparse.Namespace, llm: str) -> list[Task]:
    names = [each.strip() for each in args.datasets.split(",")]
    names = [n for name in names for n in (HELD_OUT if name == "held_out" else (name,))]
    benchmarks = [get_benchmark(name) for name in dict.fromkeys(names)]
    given = {name: getattr(args, name) for name in _OVERRIDES}
    overrides = {name: value for name, value in given.items() if value is not None}
    if args.prompt is not None:
        overrides["prompt"] = args.prompt
    if args.mode:
        overrides["ranking"] = args.mode == "rank"
    candidates: tuple[str, ...] = ()
    if args.candidates:
        candidates = tuple(filter(None, map(str.strip, read_lines(args.candidates))))
        if not candidates:
            raise ValueError(f"--candidates {args.candidates}: it has no line with a text")
    relevance = read_relevance(args.relevance) if args.relevance else {}
    tasks, wrong = [], []
    for benchmark in benchmarks:
        try:
            task = open_task(
                benchmark,
                Path(args.data),
                llm,
                split=args.split or "",
                limit=args.limit,
                candidates=candidates,
                overrides=overrides,
                scoring=args.predictions is not None,
            )
        except (ValueError, OSError) as error:
            wrong.append(str(error))
            continue
        if benchmark.name == "visual_dialog":
            task = dataclasses.replace(task, relevance=relevance)
        tasks.append(task)
    if wrong:
        raise ValueError("\n  ".join([f"{len(wrong)} datasets cannot be evaluated:", *wrong]))
    _refuse_unused(tasks, given, candidates, relevance)
    return tasks


def _refuse_unused(
    tasks: list[Task], given: dict[str, Any], candidates: tuple[str, ...], relevance: dict[str, Any]
) -> None:
    """Raises a ValueError where a flag changes nothing of any dataset."""
    used = {name for task in tasks for name in task.settings}
    wrong = [name for name, value in given.items() if value is not None and name not in used]
    if candidates and not any(task.candidates for task in tasks):
        wrong.append("candidates")
    if relevance and not any(task.relevance for task in tasks):
        wrong.append("relevance")
    if wrong:
        names = ", ".join(task.name for task in tasks)
        raise ValueError(f"{', '.join(f'--{each}' for each in wrong)}: not used by {names}")


def _compare(first: Path, second: Path) -> int:
    labels = (f"A {first}", f"B {second}")
    for found in compare.compare(first, second):
        for each in compare.lines(found, labels):
            print(each)
    return 0


def _families(args: argparse.Namespace, command: str) -> int:
    """Exact match by family of questions, beside its baselines: of `shapes` and of JSON lines."""
    if cluster.read_flags(args)[0] is not None:
        raise ValueError("without --datasets one process evaluates: start it without the others")
    if not args.checkpoint:
        raise ValueError("--checkpoint: needed")
    run = _read_run(Path(args.checkpoint))
    data: str = args.data or (run["config"]["validation"]["path"] if run else "")
    out = args.out or (Path(args.checkpoint) if run else None)
    if not data or out is None:
        missing = " and ".join(
            name for name, value in (("--data", data), ("--out", out)) if not value
        )
        raise ValueError(f"{missing}: needed, because {args.checkpoint} is no run that says it")
    given = {name: getattr(args, name) for name in _DECODING if getattr(args, name) is not None}
    config = GenerationConfig.of(**given)
    tasks = []
    for split in args.split.split(",") if args.split else _test_splits(data):
        records, digest = open_records(data, split)
        digest = families.content_digest(records, digest) if data.endswith(_LINES) else digest
        tasks.append(families.family_task(split, records, config, digest=digest, limit=args.limit))
    out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written: now, not afterwards
    blip = load(args.checkpoint, dtype=args.dtype)
    weights = weights_digest(blip.source or read_source(args.checkpoint))
    model = {"checkpoint": str(args.checkpoint), "weights": weights, "data": str(data)}
    model["dtype"] = str(blip.model.dtype)
    blip.silent = True  # the suite says how far it is
    baselines = []
    if not args.no_baselines:
        baselines.append(families.Baseline("blind", blip, weights, black=True))
        if run:
            baselines.append(families.Baseline("before", _before(run, blip), _start_of(run)))
    size = _FAMILIES_BATCH if args.batch_size is None else args.batch_size
    finished = suite.run(
        *(blip, tasks, out),
        model=model,
        size=size,
        limit=args.limit,
        baselines=baselines,
        replace=True,
    )
    metrics = read_metrics(args.checkpoint) if run else ()
    answers = read_answers(args.checkpoint) if run else ()
    return _finish(out, finished, model, command, metrics, answers)


def _is_default(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) == parser.get_default(name)


def _refuse_ignored(args: argparse.Namespace, given: set[str]) -> None:
    """Raises a ValueError where a flag is given that the others leave without effect."""
    if args.list or args.compare:
        kind = "list" if args.list else "compare"
        wrong, why = given - {kind}, f"not used with --{kind}, which takes no other flag"
    elif args.datasets and args.predictions:
        answering = {"checkpoint", "batch_size", "dtype", "fsdp", "tensor", "no_baselines"}
        wrong = given & (answering | set(_OVERRIDES))
        why = "not used with --predictions: nothing is answered, what is there is scored"
    elif args.datasets:
        wrong, why = given & {"no_baselines"}, "only used without --datasets"
    else:
        benchmarks = {"prompt", "mode", "candidates", "relevance", "length_normalise"}
        wrong, why = (
            given & (benchmarks | {"predictions", "fsdp", "tensor"}),
            ("only used with --datasets"),
        )
    if wrong:
        raise ValueError(f"{', '.join(f'--{name}' for name in sorted(wrong))}: {why}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", help="a Hugging Face folder, a converted one, a run, or an embedded name")
    add("--list", action="store_true", help="print datasets, prompts, settings; then end")
    add("--datasets", help=f"with commas: held_out, {', '.join(BENCHMARKS)}")
    add("--data", help="see above; of families a JSON-lines file or `shapes` (default: the run's)")
    add("--split", help="other than the paper's (of families one or more; default: test splits)")
    add("--limit", type=int, default=0, help="questions of each, always the same (default: all)")
    add("--out", type=Path, help="folder to write to (of families by default the run)")
    add("--batch_size", type=int, help="questions at once, of datasets on each device (8)")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two --out, or predictions")
    add("--predictions", type=Path, help="JSON lines with id, and text or scores; or a VQA tool's")
    add(
        "--relevance", type=Path, metavar="FILE", help="dense annotations, for visual_dialog's NDCG"
    )
    add("--no_baselines", action="store_true", help="of families: without `blind` and `before`")
    group = parser.add_argument_group("instead of what the protocols of the datasets say")
    add = group.add_argument
    add("--prompt", help="placeholders: {question} {options} {context} {ocr} {history} {answer}")
    add("--mode", choices=("rank", "generate"), help="rank candidates, or generate")
    add("--candidates", type=Path, metavar="FILE", help="one a line, of msvd_qa and msrvtt_qa")
    add_flags(group, *_DECODING, unset=True)
    add("--length_normalise", action="store_true", default=None, help="of a ranking: mean, not sum")
    group = parser.add_argument_group("where the model lies")
    add = group.add_argument
    add("--dtype", choices=DTYPES, help="(bfloat16, on a CPU float32)")
    add("--fsdp", type=int, default=1, help="devices that weights are split over (1)")
    add("--tensor", type=int, default=1, help="devices that share every question (1)")
    cluster.add_flags(parser)
    return parser


def _read_run(folder: Path) -> dict[str, Any] | None:
    """The config.json of a run directory; None for anything else."""
    path = folder / "config.json"
    if not (folder / "checkpoints").is_dir() or not path.is_file():
        return None
    return read_json(path, allow_nan=True)


def _test_splits(data: str) -> list[str]:
    if data in DATASETS:
        return [split for split in DATASETS[data] if split.startswith("test")]
    return ["test"]


def _start_of(run: dict[str, Any]) -> str:
    """The text that stands for the weights that the run started from."""
    return f"{run['base']['sha256']} {run['config']['model']['init']}"


def _before(run: dict[str, Any], blip: InstructBlipPipeline) -> InstructBlipPipeline:
    """The model that the run started from."""
    start = read_start(
        run["base"]["path"],
        init=run["config"]["model"]["init"],
        trainable=tuple(run["trainable"]),
        fields={"qformer.instruction_aware": blip.variant.qformer.instruction_aware},
        frozen_dtype=blip.model.dtype,
    )
    text = TextProcessor.load(start.folder, start.variant)
    dtype = jnp.dtype(blip.model.dtype)
    return InstructBlipPipeline(start.variant, start.frozen | start.trainable, text, dtype=dtype)
