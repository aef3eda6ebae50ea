"""Handling of steps whose loss or gradient norm is NaN or infinite: logged, skipped or fatal."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from jax_instructblip.training.checkpoints import Checkpoints

FILE = "non_finite.jsonl"


class NonFiniteGuard:
    """Logs steps with a NaN or infinite loss or gradient norm; ends the run if they are too many.

    All processes take the same decision, because the numbers are those of the global batch.
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
        """Sets up the guard, which appends to `non_finite.jsonl` in `workdir`.

        With `skip`, the train step leaves weights and moments unchanged on a non-finite step, and
        the run ends after `limit` such steps in a row; without, it ends at the first one. `ids(n)`
        returns the sample ids of batch n. `checkpoints` is used to name the newest one in the
        error.
        """
        self._path, self._skip, self._limit, self._ids = workdir / FILE, skip, limit, ids
        self._checkpoints = checkpoints
        self._row: list[int] = []  # the latest consecutive non-finite steps

    def check(self, number: int, values: Mapping[str, float]) -> None:
        """Logs step `number` if `loss` or `gradient_norm` in its metrics `values` is not finite.

        Raises:
            ValueError: the run must end: steps are not skipped, or the limit is reached.
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
