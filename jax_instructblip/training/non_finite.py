"""Steps whose loss or gradient is no number: who is to blame, and whether the run goes on."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from jax_instructblip.training.checkpoints import Checkpoints

FILE = "non_finite.jsonl"


class NonFiniteGuard:
    """Writes such steps down with their samples, and ends the run: at once, or after many in a row.

    The numbers are of the global batch and so the same in every process: all come to the same end.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        skip: bool,
        limit: int,
        ids: Callable[[int], Sequence[str]],
        checkpoints: Checkpoints,
    ):
        """`skip`: the step left weights and moments alone; `ids(n)`: the samples of batch n."""
        self._path, self._skip, self._limit, self._ids = workdir / FILE, skip, limit, ids
        self._checkpoints = checkpoints
        self._row: list[int] = []  # the last steps, all of them not finite

    def check(self, number: int, values: Mapping[str, float]) -> None:
        """Takes note of the numbers of a step.

        Raises:
            ValueError: the run cannot go on.
        """
        if math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]):
            self._row = []
            return
        self._row.append(number)
        ids = list(self._ids(number - 1))
        if jax.process_index() == 0:
            line = {"step": number, "samples": ids, "skipped": self._skip}
            line |= {name: str(values[name]) for name in ("loss", "gradient_norm")}
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(line) + "\n")
        saved = self._checkpoints.steps()
        newest = self._checkpoints.location(saved[-1]) if saved else "none"
        numbers = f"loss {values['loss']}, gradient norm {values['gradient_norm']}"
        if not self._skip:
            raise ValueError(
                f"step {number}: {numbers}, and nothing after it can be trusted. Its samples: "
                f"{', '.join(ids)}. Newest checkpoint: {newest}; lower "
                "config.optimizer.learning_rate or set config.optimizer.clip_norm "
                "(config.train.non_finite=skip leaves such steps out)"
            )
        if len(self._row) >= self._limit:
            raise ValueError(
                f"step {number}: {numbers}; as in the steps before it, {len(self._row)} in a row "
                f"(config.train.non_finite_limit): the weights themselves are at fault, or all "
                f"data. Their samples are in {self._path}. Newest checkpoint: {newest}; lower "
                "config.optimizer.learning_rate or set config.optimizer.clip_norm"
            )
