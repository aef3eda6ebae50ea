"""Device utilisation of a run: FLOPs per second against the peak (MFU), memory, profiler traces."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_instructblip.models import flops
from jax_instructblip.models.variants import Variant

# Vendors' peak FLOPs per second of one JAX device for dense bfloat16 products (float16 on devices
# without bfloat16). The first pattern that matches `device_kind` applies.
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
WARM_UP = 3  # steps before a trace begins, so that it shows no compilation


def peak_flops(stated: float = 0.0, kind: str | None = None) -> float:
    """Returns the peak FLOPs per second of one device; 0 if unknown.

    `stated`, if not 0, wins over the table `PEAKS`; `kind` is the `device_kind` to look up there,
    by default that of the first device.
    """
    kind = jax.devices()[0].device_kind if kind is None else kind
    return stated or next((peak for pattern, peak in PEAKS if re.search(pattern, kind)), 0.0)


class Utilisation:
    """Model FLOPs utilisation (MFU): the FLOPs that training needs as a share of the devices' peak.

    Padding and rematerialisation are not counted (`flops.useful`): what they cost lowers the share.
    """

    def __init__(
        self, variant: Variant, trainable: Sequence[str], peak: float, *, patches: bool = False
    ):
        """Sets the model, its trained trees, and the peak FLOPs per second of one device.

        With a peak of 0 (unknown) nothing is computed. With `patches` batches have patch features,
        and the vision tower does no work.
        """
        self._variant, self._trainable, self._peak = variant, tuple(trainable), peak
        self._patches = patches

    def of_step(self, sizes: np.ndarray, batch_size: int) -> int:
        """Returns the useful FLOPs of a step on all devices together; 0 without a peak.

        `sizes` are those of this host's samples (`data.batch.sample_sizes`); the other samples of
        the `batch_size` of a step are taken to be as long.
        """
        if not self._peak:
            return 0
        own = flops.useful(self._variant, sizes, self._trainable, patches=self._patches)
        return own * batch_size // len(sizes)

    def metrics(self, done: int, seconds: float) -> dict[str, float]:
        """Returns `model_flops_utilisation` (0 to 1) and `model_tflops_per_second` as a dict.

        `done` are the useful FLOPs done on all devices in `seconds` (the sum of `of_step`). Returns
        {} if `done` or the peak is 0.
        """
        if not self._peak or not done:
            return {}
        return {
            "model_flops_utilisation": done / seconds / (self._peak * jax.device_count()),
            "model_tflops_per_second": done / seconds / 1e12,
        }


def memory() -> dict[str, float]:
    """Returns `memory_gb` and `memory_peak_gb` of the fullest local device; {} if not reported."""
    statistics = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"memory_gb": "bytes_in_use", "memory_peak_gb": "peak_bytes_in_use"}
    return {
        name: max(stats[key] for stats in statistics) / 1e9
        for name, key in names.items()
        if statistics and all(key in stats for stats in statistics)
    }


class Trace:
    """Writes a `jax.profiler` trace of some training steps, for TensorBoard and Perfetto."""

    def __init__(self, folder: Path, *, first: int, steps: int):
        """Plans a trace of `steps` steps (0: none) that begins `WARM_UP` steps after step `first`.

        `first` is the step that the run starts from; the first steps after it compile.
        """
        self._folder, self._begin = folder, first + WARM_UP + 1
        self._end, self._step = self._begin + steps, first
        self._awaited, self._going = steps > 0, False

    def before(self, step: int, state: Any) -> str:
        """Starts or ends the trace if due before `step`; returns a message when it ends, else "".

        `state` is waited for, so that the trace has whole steps.
        """
        if step == self._begin and self._awaited:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._going = True
        if step == self._end:
            return self.close(state)
        self._step = step
        return ""

    def close(self, state: Any = None) -> str:
        """Stops the trace once `state` is computed; returns a message the first time, later "".

        If the trace has not begun yet, the message says that the run was too short.
        """
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
