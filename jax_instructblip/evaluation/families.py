"""Accuracy per family of questions, with baselines, for records that belong to no benchmark.

A family is the set of records with the same `Record.task`.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax_instructblip.data.records import Record, RecordSubset
from jax_instructblip.evaluation.metrics.exact_match import NO_FAMILY, is_correct, majority_answer
from jax_instructblip.evaluation.metrics.metric import mean
from jax_instructblip.evaluation.protocol import Protocol
from jax_instructblip.evaluation.task import Task, pick_numbers
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import InstructBlipPipeline

METRIC = "family_accuracy"
MAJORITY = "majority"
MEANING = {
    "accuracy": "the model evaluated",
    "before": "the same model before it was tuned",
    "blind": "the model evaluated, shown black images",
    MAJORITY: "the best constant answer of each family",
}


class Baseline(NamedTuple):
    """Another way to answer the same questions, for comparison.

    Attributes:
      name: "before" or "blind", explained in `MEANING`.
      blip: the model that answers.
      weights: a digest of its weights.
      black: show it black images instead of the real ones.
    """

    name: str
    blip: InstructBlipPipeline
    weights: str  # a digest
    black: bool = False


def family_task(
    name: str,
    records: Sequence[Record],
    config: GenerationConfig,
    *,
    digest: str = "",
    limit: int = 0,
    prompt: str = "{question}",
) -> Task:
    """Returns a task that asks the records' prompts, by default as they are, scored by family.

    `name` names the task and its split. `digest` identifies the content of the records. `limit` is
    the number of records to take, always the same ones; 0: all. `prompt` is as in `Protocol`.
    """
    if limit:
        records = RecordSubset(records, pick_numbers(len(records), limit))
    protocol = Protocol(name, prompt, split=name, metric=METRIC, decoding=config)
    return Task(protocol, name, records, digest, protocol.settings())


def content_digest(records: Sequence[Record], digest: str) -> str:
    """Returns a digest of the records and their image files, to notice that either has changed.

    `digest` is that of the records. An image file counts by path, size and time of last change, or
    as absent; images that are no files are skipped.
    """
    hasher = hashlib.sha256(digest.encode())
    for number in range(len(records)):
        for image in records[number].images:
            if isinstance(image, str):
                try:
                    status = os.stat(image)
                except (OSError, ValueError):
                    hasher.update(f"{image} is absent".encode(errors="backslashreplace"))
                    continue
                facts = f"{image} {status.st_size} {status.st_mtime_ns}"
                hasher.update(facts.encode(errors="backslashreplace"))
    return hasher.hexdigest()


def majority(records: Sequence[Record]) -> dict[str, float]:
    """Returns the accuracy, 0 to 1, of each family's best constant answer.

    Keys are `accuracy/FAMILY` and, for the mean over families, `accuracy`. Records without answers
    do not count; {} if there are no others.
    """
    truths: dict[str, list[Sequence[str]]] = {}
    for record in records:
        if record.answers:
            truths.setdefault(record.task or NO_FAMILY, []).append(record.answers)
    shares = {}
    for family in sorted(truths):
        best = majority_answer(truths[family])
        shares[family] = mean([float(is_correct(best, each)) for each in truths[family]])
    named = {f"accuracy/{family}": share for family, share in shares.items()}
    return {"accuracy": mean(shares.values()), **named} if shares else {}


def counts(records: Sequence[Record]) -> dict[str, int]:
    """Returns the number of records of each family, in alphabetical order."""
    numbers: dict[str, int] = {}
    for record in records:
        numbers[record.task or NO_FAMILY] = numbers.get(record.task or NO_FAMILY, 0) + 1
    return {family: numbers[family] for family in sorted(numbers)}


def by_family(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Returns head and rows of a result's table: family, questions, a share (0 to 1) per column.

    `result` is an entry of `results.json`. The columns are the model's accuracy and its baselines;
    the last row is the mean over families.
    """
    columns = {"accuracy": result["values"], **result["baselines"]}
    columns = {name: columns[name] for name in MEANING if name in columns}
    rows = [
        [family, count, *(values[f"accuracy/{family}"] / 100 for values in columns.values())]
        for family, count in result["families"].items()
    ]
    means = [values["accuracy"] / 100 for values in columns.values()]
    rows.append(["mean of the families", result["count"], *means])
    return ["family", "questions", *columns], rows


def table(name: str, result: Mapping[str, Any]) -> str:
    """Formats entry `name` of `results.json` as text: a table, and questions not asked."""
    lines = [f"\n{name}: not scored, {result['unscored']}"]
    if not result["unscored"]:
        (_, _, *columns), rows = by_family(result)
        width = max(len(str(row[0])) for row in rows)
        lines = [f"\n{name:{width}}  questions  " + "  ".join(f"{each:>8}" for each in columns)]
        for family, count, *shares in rows:
            cells = "  ".join(f"{share:8.1%}" for share in shares)
            lines.append(f"{family:{width}}  {count:9}  {cells}")
        if result["standard_error"] is not None:
            lines.append(f"standard error of the mean: {result['standard_error']:.1f}")
    lines += [f"could not be asked: {problem}" for problem in result["problems"]]
    return "\n".join(lines)
