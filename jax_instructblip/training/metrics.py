"""The metrics of a run: written as JSON lines and TensorBoard events, and read back."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_instructblip.atomic import write_file
from jax_instructblip.data import loader
from jax_instructblip.data.text import TRUNCATED
from jax_instructblip.files import parse_json
from jax_instructblip.training import profiling
from jax_instructblip.training.profiling import Utilisation

FILE = "metrics.jsonl"
DAMAGED = "metrics.damaged.jsonl"
FOLDER = "tensorboard"
ANSWERS = "answers.jsonl"
SIZES = ("images", "instruction", "slots", "targets")  # columns of `batch.sample_sizes`
_SHOWN = ("prompt", "answers", "text")  # columns of the answers in TensorBoard


class MetricsWriter:
    """Appends `{"step": ..., "time": ..., name: number, ...}` to `metrics.jsonl` and TensorBoard.

    A run resumed at step `start` first removes lines of later steps, so every step is there once.

    Attributes:
      damaged: number of unreadable lines that were moved to `metrics.damaged.jsonl`.
    """

    def __init__(self, folder: str | os.PathLike, *, start: int = 0, silent: bool = False):
        """Opens the files in `folder`; removes lines of steps after `start`.

        With `silent` nothing is ever written: only process 0 writes, as all have the same numbers.
        """
        self._silent, self.damaged = silent, 0
        if silent:
            return
        path = Path(folder) / FILE
        lines, damaged = _parse(path)
        self.damaged = len(damaged)
        if damaged:
            with (Path(folder) / DAMAGED).open("ab") as file:
                file.write(b"".join(line + b"\n" for line in damaged))
        kept = [line for line in lines if line["step"] <= start]
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._answers = Path(folder) / ANSWERS
        answers = [line for line in read_answers(folder) if start and line["step"] <= start]
        if answers or self._answers.exists():
            write_file(self._answers, "".join(map(_json_line, answers)))
        self._file = path.open("a", buffering=1)  # line-buffered, so that a kill loses no line
        self._board = _open_board(Path(folder) / FOLDER, purge_step=start + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line with the metrics of `step`, numbers by name."""
        if self._silent:
            return
        self._file.write(
            json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n"
        )
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def write_answers(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Appends sample answers at `step`: `evaluation.predictions.Prediction` rows as dicts."""
        if self._silent or not answers:
            return
        with self._answers.open("a", encoding="utf-8") as file:
            file.writelines(_json_line({"step": step, **answer}) for answer in answers)
        cell = lambda value: " / ".join(value) if isinstance(value, list | tuple) else str(value)
        rows = [_SHOWN, ["---"] * len(_SHOWN)]
        rows += [[cell(answer.get(name, "")) for name in _SHOWN] for answer in answers]
        plain = lambda text: " ".join(text.replace("|", " ").split())  # a cell is one line
        table = (f"| {' | '.join(map(plain, row))} |" for row in rows)
        self._board.add_text("validation/answers", "\n".join(table), step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._silent:
            return
        self._file.close()
        self._board.close()


def read_metrics(folder: str | os.PathLike) -> list[dict[str, float]]:
    """Returns the lines of a run's `metrics.jsonl` as dicts; [] if there is no such file.

    Unreadable lines are skipped, such as a last line that was cut short by a kill.
    """
    return _parse(Path(folder) / FILE)[0]


def read_answers(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a run's `answers.jsonl`: the dicts of `write_answers`, with the step.

    Unreadable lines are skipped, such as a last line that was cut short by a kill.
    """
    path = Path(folder) / ANSWERS
    answers = []
    for raw in path.read_bytes().split(b"\n") if path.is_file() else ():
        with contextlib.suppress(ValueError):
            line = parse_json(raw, allow_nan=True)
            if isinstance(line, dict) and _is_answer(line):
                answers.append(line)
    return answers


def _is_answer(line: dict[str, Any]) -> bool:
    """Returns True if `line` has an integer step and text in every field that a report shows."""
    texts = [line.get(name, "") for name in ("id", "prompt", "text")]
    truth = line.get("answers", [])
    return (
        type(line.get("step")) is int
        and isinstance(truth, list)
        and all(isinstance(each, str) for each in [*texts, *truth])
    )


def _json_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def newest_step(folder: str | os.PathLike) -> int:
    """Returns the last step in a run's metrics; 0 if none, at least 1 if lines are damaged."""
    lines, damaged = _parse(Path(folder) / FILE)
    return int(max([line["step"] for line in lines] + [1] * bool(damaged), default=0))


def _parse(path: Path) -> tuple[list[dict[str, float]], list[bytes]]:
    """Returns the readable lines of a metrics file as dicts, and the damaged ones as raw bytes."""
    lines: list[dict[str, float]] = []
    damaged: list[bytes] = []
    for raw in path.read_bytes().split(b"\n") if path.is_file() else ():
        if not raw:
            continue
        try:
            line = parse_json(raw, allow_nan=True)
        except ValueError:
            line = None
        if isinstance(line, dict) and _has_numbers(line):
            lines.append(line)
        else:
            damaged.append(raw)
    return lines, damaged


def _has_numbers(line: dict[str, Any]) -> bool:
    """Returns True if all values of `line` are numbers and it has an integer step."""
    numbers = all(type(value) in (int, float) for value in line.values())
    return numbers and type(line.get("step")) is int


class Window:
    """Collects the numbers of the steps since the last line of metrics; `close` summarises them."""

    def __init__(self, batch_size: int, utilisation: Utilisation | None = None):
        """Starts an empty window; `batch_size` is the number of samples per step on all devices.

        With `utilisation` the summary includes the model FLOPs utilisation.
        """
        self._batch_size, self._utilisation = batch_size, utilisation
        self.restart()

    def skip(self, seconds: float) -> None:
        """Excludes `seconds` from the rates: time not spent on steps, such as a validation."""
        self._began += seconds

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Counts the block's time under `what`, "data" or "checkpoint".

        All other time counts as device time.
        """
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent[what] += time.monotonic() - began

    def restart(self) -> None:
        """Empties the window and restarts its clock."""
        self._spent: dict[str, float] = {"data": 0.0, "checkpoint": 0.0}
        self._began = time.monotonic()
        self._steps: list[dict[str, float]] = []
        self._skipped = 0.0
        self._flops = 0
        self._sizes: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._counts = {name: 0.0 for name in ("replaced", *TRUNCATED)}
        self._text = np.zeros(2, np.int64)

    def add(self, values: dict[str, float], counts: loader.Counts) -> None:
        """Adds the metrics of one step and this host's data counts (`loader.load`)."""
        if self._utilisation is not None:
            self._flops += self._utilisation.of_step(counts["sizes"], self._batch_size)
        self._sizes.append(counts["sizes"])
        self._rows.append(counts["row"])
        self._steps.append(values)
        self._skipped += values.get("skipped", 0.0)
        self._counts["replaced"] += float((counts["replaced"] > 0).sum())
        self._text += counts["text"]
        for name, count in zip(TRUNCATED, counts["truncated"].sum(axis=0), strict=True):
            self._counts[name] += float(count)

    def close(self) -> dict[str, float]:
        """Returns the summary of the window as {name: number}, and restarts it.

        It has the last step's metrics, except for `loss` (the mean over steps with a finite loss)
        and `skipped` (the number of skipped steps); non-finite values are left out. Then the rates
        per second on all devices, of samples, of target tokens (`tokens_per_second`), and of tokens
        and visual vectors that the language model reads (`slots_per_second`); utilisation
        (`Utilisation`), and these:

            sample_NAME       mean of this host's samples: images, instruction, slots, targets
            row_NAME          most slots and targets that a row has, padding included
            padding_share     share of this host's token positions that are padding
            data_share        share of the time spent waiting for batches
            checkpoint_share  share of the time spent copying state for a checkpoint
            device_share      share of the time left
            replaced, truncated_NAME    samples with a replaced image or a truncated text, if any
        """
        seconds = max(time.monotonic() - self._began, 1e-9)
        values = dict(self._steps[-1])
        finite = [each["loss"] for each in self._steps if math.isfinite(each["loss"])]
        values["loss"] = sum(finite) / len(finite) if finite else math.nan
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if "skipped" in values:
            values["skipped"] = self._skipped
        values["steps_per_second"] = len(self._steps) / seconds
        values["samples_per_second"] = values["steps_per_second"] * self._batch_size
        values["tokens_per_second"] = sum(each.get("tokens", 0.0) for each in self._steps) / seconds
        means = np.concatenate(self._sizes).mean(axis=0).tolist()
        values |= {f"sample_{name}": mean for name, mean in zip(SIZES, means, strict=True)}
        widest = zip(
            ("row_slots", "row_targets"), np.max(self._rows, axis=0).tolist(), strict=False
        )
        values |= dict(widest)
        values["slots_per_second"] = values["samples_per_second"] * values["sample_slots"]
        values |= {f"{what}_share": spent / seconds for what, spent in self._spent.items()}
        values["device_share"] = 1 - sum(self._spent.values()) / seconds
        if self._utilisation is not None:
            values |= self._utilisation.metrics(self._flops, seconds)
        values |= profiling.memory()
        filled, positions = self._text
        values["padding_share"] = 1 - filled / positions
        names = {"replaced": "replaced", **{name: f"truncated_{name}" for name in TRUNCATED}}
        values |= {names[name]: count for name, count in self._counts.items() if count}
        self.restart()
        return values


def _open_board(folder: Path, purge_step: int) -> Any:
    """Returns the writer of TensorBoard files, a `tensorboardX.SummaryWriter`.

    tensorboardX imports torch wherever that is installed, which takes two seconds; only torch's own
    tensors need it. While tensorboardX is imported, torch is hidden.
    """
    hidden: dict[str, Any] = {} if "torch" in sys.modules else {"torch": None}
    sys.modules.update(hidden)
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in hidden:
            del sys.modules[name]
    return SummaryWriter(str(folder), purge_step=purge_step)
