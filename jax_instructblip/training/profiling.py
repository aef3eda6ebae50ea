"""The use of the machine: products per second against its peak, memory, traces."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jax_instructblip.models import flops
from jax_instructblip.training.objective import Objective

# What makers state of bfloat16 products (float16 where there is no bfloat16), without sparsity:
# FLOPs a second of what JAX calls a device. The first pattern that `device_kind` matches counts.
PEAKS = (
    (r"TPU v4$", 275e12),
    (r"TPU (v5 lite|v5e)", 197e12),
    (r"TPU v5p?$", 459e12),
    (r"TPU (v6 lite|v6e)", 918e12),
    (r"\bB200\b", 2250e12),
    (r"\bH200\b|\bGH200\b|\bH100\b.*HBM3", 989e12),
    (r"\bH100\b", 756e12),
    (r"\bA100\b|\bA800\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bA10G\b", 70e12),
    (r"\bA10\b", 125e12),
    (r"\bV100\b", 125e12),
    (r"\bT4\b", 65e12),
)
WARM_UP = 3  # steps before a trace begins: compilation is none of it


def peak_flops(stated: float = 0.0, kind: str | None = None) -> float:
    """FLOPs a second of one device: as `stated`, or as known of its kind; 0: unknown."""
    kind = jax.devices()[0].device_kind if kind is None else kind
    return stated or next((peak for pattern, peak in PEAKS if re.search(pattern, kind)), 0.0)


class Utilisation:
    """The share of the peak that the products of the steps come to (MFU).

    Counted are those that the model asks for: not what is computed again to save memory.
    """

    def __init__(self, objective: Objective, peak: float):
        """`peak` of one device, 0 for unknown: then nothing is counted, which takes seconds."""
        self._objective, self._peak = objective, peak
        self._known: dict[tuple[Any, ...], int] = {}

    def of_step(self, trainable: Any, frozen: Any, batch: Mapping[str, Any]) -> int:
        """FLOPs of a step on a batch of these shapes, on all devices together."""
        if not self._peak:
            return 0
        key = tuple((name, leaf.shape) for name, leaf in sorted(batch.items()))
        if key not in self._known:
            like = lambda tree: jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree
            )

            def loss(trainable: Any, frozen: Any, batch: Any, rng: Any) -> Any:
                totals = self._objective.totals(batch)
                return self._objective({**frozen, **trainable}, batch, rng, totals)

            arguments = like(trainable), like(frozen), like(dict(batch)), jax.random.key(0)
            jaxpr = jax.make_jaxpr(jax.grad(loss, has_aux=True))(*arguments)
            self._known[key] = flops.count(jaxpr.jaxpr)
        return self._known[key]

    def metrics(self, done: int, seconds: float) -> dict[str, float]:
        """`model_flops_utilisation` (0 to 1) of so many FLOPs in that time."""
        if not self._peak or not done:
            return {}
        return {
            "model_flops_utilisation": done / seconds / (self._peak * jax.device_count()),
            "model_tflops_per_second": done / seconds / 1e12,
        }


def memory() -> dict[str, float]:
    """`memory_gb` and `memory_peak_gb` of the fullest local device; {} where none tells."""
    statistics = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"memory_gb": "bytes_in_use", "memory_peak_gb": "peak_bytes_in_use"}
    return {
        name: max(stats[key] for stats in statistics) / 1e9
        for name, key in names.items()
        if statistics and all(key in stats for stats in statistics)
    }


class Trace:
    """Writes a trace of some steps for TensorBoard and Perfetto (`jax.profiler`)."""

    def __init__(self, folder: Path, *, first: int, steps: int):
        """A trace of `steps` steps (0: none), a few after `first`, when nothing is compiled."""
        self._folder, self._begin = folder, first + WARM_UP + 1
        self._end, self._step = self._begin + steps, first
        self._awaited, self._going = steps > 0, False

    def before(self, step: int, state: Any) -> str:
        """Called before each step with the state so far; a sentence when a trace is written."""
        if step == self._begin and self._awaited:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._going = True
        if step == self._end:
            return self.close(state)
        self._step = step
        return ""

    def close(self, state: Any = None) -> str:
        """Ends the trace when the device has done what it was told; a sentence, the first time."""
        if not self._awaited:
            return ""
        self._awaited = False
        if not self._going:
            return (
                f"no trace: the run ended with step {self._step}, a trace begins with step "
                f"{self._begin}, when everything is compiled"
            )
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._going = False
        return f"trace of steps {self._begin} to {self._step}: tensorboard --logdir {self._folder}"
