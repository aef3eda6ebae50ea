"""Training objectives: losses that add up over devices and over parts of a batch.

Each loss term is a sum over samples or tokens, divided by a total of the *whole* batch that is
known before any gradient is computed. So the loss and gradient of a batch are the plain sums over
its parts, however the batch is divided.
"""

import dataclasses
from typing import Any, Protocol, cast

import jax.numpy as jnp
from jax import Array

from jax_instructblip.models.dense import WordFactors
from jax_instructblip.models.vlm import Batch, VisionLanguageModel
from jax_instructblip.training.loss import count_targets, word_loss

Totals = dict[str, Array]
Metrics = dict[str, Array]


class Objective(Protocol):
    """A loss function of parameters and a batch.

    Attributes:
      whole_batch: the reason why the batch cannot be divided, for example a term that compares
        all samples with each other; "" if it can be divided.
    """

    @property
    def whole_batch(self) -> str:
        """The reason why the batch cannot be divided into parts; "" if it can."""
        ...

    def totals(self, batch: Batch) -> Totals:
        """Returns the denominator of each loss term by name; those of parts of a batch add up."""
        ...

    def __call__(
        self, params: Any, batch: Batch, rng: Array, totals: Totals
    ) -> tuple[Array, Metrics]:
        """Returns the loss and metrics, which both add up over parts; `rng` draws the dropout.

        `params` are all parameters, trained and frozen, as one nested dict. `totals` are those of
        the whole batch, also if `batch` is only a part.
        """
        ...


@dataclasses.dataclass(frozen=True)
class LanguageObjective:
    """Mean cross-entropy of the target tokens: for InstructBLIP, BLIP-2's stage 2 and LLaVA."""

    model: VisionLanguageModel
    whole_batch: str = ""

    def totals(self, batch: Batch) -> Totals:
        """Returns a dict of `tokens`, the number of target tokens, a float32 scalar."""
        return {"tokens": count_targets(batch["targets"])}

    def __call__(
        self, params: Any, batch: Batch, rng: Array, totals: Totals
    ) -> tuple[Array, Metrics]:
        """Returns the loss and no metrics; a batch without any target gives 0, not NaN."""
        variables, rngs = {"params": params}, {"dropout": rng}
        factors = self.model.apply(variables, batch, train=True, rngs=rngs, method="asked_factors")
        dtype = jnp.dtype(self.model.dtype)
        total = word_loss(*cast(WordFactors, factors), batch["targets"], dtype)
        return cast(Array, total) / jnp.maximum(totals["tokens"], 1.0), {}


def check_parts(objective: Objective, *, accumulate: int, mapped: bool) -> None:
    """Raises a ValueError if a batch would be divided although the objective needs all of it.

    `accumulate` is the number of gradient accumulation parts, `mapped` is True under pmap.
    """
    if objective.whole_batch and (accumulate > 1 or mapped):
        how = "pmap (config.parallel.mode)" if mapped else "parts (config.train.accumulate)"
        raise ValueError(
            f"a batch cannot be worked on in {how} with this objective: {objective.whole_batch}"
        )
