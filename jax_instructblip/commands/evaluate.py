"""Measures exact match by task family, beside its baselines, and writes a report."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jax_instructblip.data.records import Record
from jax_instructblip.data.shapes_records import DATASETS
from jax_instructblip.data.sources import open_records
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.evaluation import harness
from jax_instructblip.evaluation.report import write_report
from jax_instructblip.folders import write_file
from jax_instructblip.inference.pipeline import InstructBlipPipeline, load
from jax_instructblip.inference.source import read_json
from jax_instructblip.training.metrics import read_metrics
from jax_instructblip.training.start import read_start


def main(argv: list[str]) -> int:
    """Prints a table for each split, writes results.json, predictions/ and report.html."""
    parser = argparse.ArgumentParser(prog="jax-instructblip evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a run, a checkpoint folder or an embedded name"
    )
    parser.add_argument(
        "--data", help="a JSON-lines file or `shapes` (default: what the run validated on)"
    )
    parser.add_argument(
        "--split", help="one or more, with commas (default: test; of shapes: all test splits)"
    )
    parser.add_argument("--limit", type=int, default=0, help="questions a split (default: all)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the run)")
    parser.add_argument("--batch_size", type=int, default=64, help="questions answered at once")
    parser.add_argument("--max_new_tokens", type=int, default=30, help="of an answer")
    parser.add_argument(
        "--no_baselines", action="store_true", help="leave out `blind` and `before`"
    )
    args = parser.parse_args(argv)
    run = _read_run(Path(args.checkpoint))
    data: str = args.data or (run["config"]["validation"]["path"] if run else "")
    out = args.out or (Path(args.checkpoint) if run else None)
    if not data or out is None:
        missing = " and ".join(
            name for name, value in (("--data", data), ("--out", out)) if not value
        )
        raise ValueError(f"{missing}: needed, because {args.checkpoint} is no run that says it")
    splits = args.split.split(",") if args.split else _test_splits(data)
    opened = {split: harness.pick(open_records(data, split)[0], args.limit) for split in splits}

    out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written: now, not afterwards
    blip = load(args.checkpoint)
    before = _before(run, blip) if run and not args.no_baselines else None
    settings = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    results: dict[str, Any] = {}
    samples = {}
    for split, records in opened.items():
        predictions = harness.answer(blip, records, **settings)
        columns = {
            "tuned": harness.accuracies(predictions),
            "majority": harness.majority_accuracies(predictions),
        }
        if not args.no_baselines:
            columns["blind"] = harness.accuracies(
                harness.answer(blip, records, blind=True, **settings)
            )
        if before is not None:
            columns["before"] = harness.accuracies(harness.answer(before, records, **settings))
        results[split] = _scores(records, columns)
        results[split]["problems"] = [
            f"{each.id}: {each.problem}" for each in predictions if each.problem
        ]
        samples[split] = list(zip(records, predictions, strict=True))
        harness.write_predictions(out / "predictions" / f"{split}.jsonl", predictions)
        print(_table(split, results[split]))
    facts = {"checkpoint": str(args.checkpoint), "data": str(data), "scoring": "exact match"}
    document = {**facts, "splits": results}
    write_file(out / "results.json", json.dumps(document, indent=1) + "\n")
    write_report(
        out / "report.html",
        title=f"{Path(args.checkpoint).name} on {Path(data).name}",
        splits=results,
        samples=samples,
        metrics=read_metrics(args.checkpoint) if run else (),
        facts=facts,
    )
    print(f"report: {out / 'report.html'}")
    return 0


def _read_run(folder: Path) -> dict[str, Any] | None:
    """The config.json of a run directory; None for anything else."""
    path = folder / "config.json"
    if not (folder / "checkpoints").is_dir() or not path.is_file():
        return None
    return read_json(path)


def _test_splits(data: str) -> list[str]:
    if data in DATASETS:
        return [split for split in DATASETS[data] if split.startswith("test")]
    return ["test"]


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


def _scores(records: Sequence[Record], columns: dict[str, dict[str, float]]) -> dict[str, Any]:
    tasks = [record.task or harness.NO_TASK for record in records]
    return {
        "count": len(records),
        "mean": {name: harness.mean(values) for name, values in columns.items()},
        "tasks": {
            task: {
                "count": tasks.count(task),
                **{name: values[task] for name, values in columns.items()},
            }
            for task in sorted(set(tasks))
        },
    }


def _table(split: str, scores: dict[str, Any]) -> str:
    columns = list(scores["mean"])
    width = max(len("mean of the families"), *map(len, scores["tasks"]))
    lines = [f"\n{split:{width}}  questions  " + "  ".join(f"{name:>8}" for name in columns)]
    rows = {**scores["tasks"], "mean of the families": {"count": scores["count"], **scores["mean"]}}
    for name, values in rows.items():
        cells = "  ".join(f"{values[column]:8.1%}" for column in columns)
        lines.append(f"{name:{width}}  {values['count']:9}  {cells}")
    for problem in scores["problems"]:
        lines.append(f"could not be asked: {problem}")
    return "\n".join(lines)
