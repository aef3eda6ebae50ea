"""The numbers of a run: JSON lines for programs, TensorBoard for eyes."""

import json
import os
import time
from pathlib import Path

from tensorboardX import SummaryWriter

from jax_instructblip.folders import write_file

FILE = "metrics.jsonl"
FOLDER = "tensorboard"


class MetricsWriter:
    """Appends `{"step": ..., "time": ..., name: number, ...}` to `metrics.jsonl` and TensorBoard.

    A run that is taken up at step `start` forgets what an earlier one wrote after it, so every
    step stands there once.
    """

    def __init__(self, folder: str | os.PathLike, *, start: int = 0, silent: bool = False):
        """Opens the files in `folder`; lines of steps after `start` are removed.

        `silent` writes nothing: of several processes that measure the same, one does.
        """
        self._silent = silent
        if silent:
            return
        path = Path(folder) / FILE
        lines = [line for line in read_metrics(folder) if line["step"] <= start]
        write_file(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = path.open("a", buffering=1)  # a line at a time, so that a kill loses none
        self._board = SummaryWriter(str(Path(folder) / FOLDER), purge_step=start + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the numbers of one step."""
        if self._silent:
            return
        self._file.write(
            json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n"
        )
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what is buffered."""
        if self._silent:
            return
        self._file.close()
        self._board.close()


def read_metrics(folder: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`, none if there is no such file.

    A last line that a kill cut short is left out.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
