"""Runs a model batch by batch, on one device or split over a mesh of devices."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jax_instructblip.data.spec import Batch
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.batching import Question, make_batches
from jax_instructblip.inference.named_methods import NamedMethods
from jax_instructblip.inference.streaming import one_ahead
from jax_instructblip.models.layers import BATCH_AXES
from jax_instructblip.parallel.mesh import batch_sharding
from jax_instructblip.progress import Progress


class BatchRunner(NamedMethods):
    """Makes batches of questions, puts them on devices and collects the results.

    Attributes:
      text: the tokenizers.
      mesh: the devices over which each batch is split; None for the first device alone.
      silent: True shows no progress lines.
    """

    elsewhere = "Similarities and matches are those of BLIP-2's first stage, a Retriever"
    text: TextProcessor
    mesh: Mesh | None
    silent: bool

    def _run(
        self,
        label: str,
        compute: Callable[[Batch, np.ndarray], Any],
        questions: Sequence[Question],
        batch_size: int,
        reserve: int = 0,
    ) -> list[tuple[Any, int]]:
        """Applies `compute(batch, row numbers)` to all batches; returns (result, real rows)."""
        batches = make_batches(self.text, questions, batch_size, self.batch_shards, reserve)
        pending = ((compute(self._on_devices(b.batch), b.rows), b.count) for b in batches)
        results = []
        line = Progress(len(questions), label, "questions", compiles=True, silent=self.silent)
        # Processes that talk to each other do one thing at a time, in the same order.
        ready = pending if self._spans else one_ahead(pending)
        with self._mesh(), line as progress:
            for result, count in ready:
                results.append((self._fetch(result), count))
                progress.update(count)
        return results

    def _fetch(self, result: Any) -> Any:
        """The whole result as numpy arrays, even if other processes hold parts of it."""
        if not self._spans:
            return jax.device_get(result)
        return multihost_utils.process_allgather(result, tiled=True)

    @property
    def _spans(self) -> bool:
        """True if other processes work on the same batches."""
        return self.mesh is not None and self.mesh.is_multi_process

    @property
    def batch_shards(self) -> int:
        """The number of parts into which the mesh splits a batch."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def _mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _on_devices(self, batch: Any) -> Any:
        """Splits the arrays of a batch by rows over the mesh; every process has the whole batch."""
        if self.mesh is None:
            return batch
        sharding = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__), batch
        )
