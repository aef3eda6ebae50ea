"""Objectives of training: terms that add up over devices and parts of a batch.

Each term is a sum over the batch divided by a total that the *whole* batch gives, known before any
gradient is taken. So the loss and the gradient of a batch are the plain sums of those of its parts,
however it is divided.
"""

import dataclasses
from typing import Any, Protocol, cast

import jax.numpy as jnp
from jax import Array

from jax_instructblip.models.vlm import Batch, VisionLanguageModel
from jax_instructblip.training.loss import count_targets, cross_entropy

Totals = dict[str, Array]
Metrics = dict[str, Array]


class Objective(Protocol):
    """A loss of parameters and a batch.

    Attributes:
      whole_batch: why a batch cannot be worked on in parts ("" where it can be): a term that
        compares samples with each other needs them all at once.
    """

    @property
    def whole_batch(self) -> str:
        """The reason why a batch cannot be worked on in parts; "" where it can."""
        ...

    def totals(self, batch: Batch) -> Totals:
        """The denominator of each term, from the batch alone; those of its parts add up."""
        ...

    def __call__(
        self, params: Any, batch: Batch, rng: Array, totals: Totals
    ) -> tuple[Array, Metrics]:
        """The loss, and metrics that add up over parts as it does; dropout is drawn from `rng`."""
        ...


@dataclasses.dataclass(frozen=True)
class LanguageObjective:
    """Mean cross-entropy of the target tokens: instruction tuning, BLIP-2's stage 2, LLaVA."""

    model: VisionLanguageModel
    whole_batch: str = ""

    def totals(self, batch: Batch) -> Totals:
        """`tokens`: how many targets there are."""
        return {"tokens": count_targets(batch["targets"])}

    def __call__(
        self, params: Any, batch: Batch, rng: Array, totals: Totals
    ) -> tuple[Array, Metrics]:
        """The loss, alone; a batch without any target gives 0, not NaN."""
        variables, rngs = {"params": params}, {"dropout": rng}
        logits = cast(Array, self.model.apply(variables, batch, train=True, rngs=rngs))
        loss = cross_entropy(logits, batch["targets"]) / jnp.maximum(totals["tokens"], 1.0)
        return loss, {}


def check_parts(objective: Objective, *, accumulate: int, mapped: bool) -> None:
    """Raises a ValueError where the batch would be divided but the objective needs all of it."""
    if objective.whole_batch and (accumulate > 1 or mapped):
        how = "pmap (config.parallel.mode)" if mapped else "parts (config.train.accumulate)"
        raise ValueError(
            f"a batch cannot be worked on in {how} with this objective: {objective.whole_batch}"
        )
