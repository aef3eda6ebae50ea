"""Workloads shared by the benchmarks: model sizes, text lengths, random samples, timers."""

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jax_instructblip.models.released import get_variant
from jax_instructblip.models.variants import (
    LlamaConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)

SIZES = {
    "full": ("instructblip-flan-t5-xl", "instructblip-vicuna-7b"),
    "middle": ("middle-t5", "middle-vicuna"),
    "tiny": ("tiny-t5", "tiny-vicuna"),
}
_VISION = VisionConfig(image_size=112, width=384, layers=6, heads=6, mlp=1536)
_QFORMER = QFormerConfig(384, 512, width=256, layers=4, heads=4, mlp=1024)
# Sizes between the tiny and the released ones, for comparisons on a CPU: 91 and 83 million weights.
MIDDLE = {
    "middle-t5": Variant(
        "instructblip",
        _VISION,
        _QFORMER,
        T5Config(width=512, head_width=64, heads=6, mlp=1024, encoder_layers=6, decoder_layers=6),
    ),
    "middle-vicuna": Variant(
        "instructblip", _VISION, _QFORMER, LlamaConfig(width=512, heads=8, mlp=1376, layers=8)
    ),
}
CORES = os.cpu_count() or 1
THREADS = (CORES, 1) if CORES > 1 else (1,)  # one is faster if other processes use the cores


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of one sample, without the image's 257 patches and 32 queries.

    Attributes:
      instruction: of the Q-Former's text.
      prompt: of the instruction in the language model's tokens.
      answer: of the targets.
      new: generated tokens.
    """

    instruction: int = 32
    prompt: int = 48
    answer: int = 16
    new: int = 64

    @classmethod
    def of(cls, variant: str) -> "Lengths":
        """Returns the lengths for a variant; short ones for tiny variants, which test the code."""
        return cls(8, 8, 4, 8) if variant.startswith("tiny") else cls()


class Sample(NamedTuple):
    """A training sample: pixels [H, W, 3] uint8, and ids [L], [T], [U] int32 of its texts."""

    image: np.ndarray
    instruction: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray

    @classmethod
    def draw(
        cls, variant: Variant, rng: np.random.Generator, instruction: int, prompt: int, answer: int
    ) -> "Sample":
        """Returns a random sample of these numbers of tokens."""
        side, vocab = variant.vision.image_size, variant.llm.vocab - 2
        ids = lambda length, vocab: rng.integers(3, vocab, length).astype(np.int32)
        return cls(
            rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
            ids(instruction, variant.qformer.vocab),
            ids(prompt, vocab),
            ids(answer, vocab),
        )


class Questions(NamedTuple):
    """Questions of one length: images [B, H, W, 3] uint8, ids [B, L] and [B, T] int32."""

    images: np.ndarray
    instructions: np.ndarray
    prompts: np.ndarray

    @classmethod
    def draw(cls, variant: Variant, size: int, lengths: Lengths) -> "Questions":
        """Returns `size` random questions."""
        rng = np.random.default_rng(0)
        of = lengths.instruction, lengths.prompt, lengths.answer
        drawn = [Sample.draw(variant, rng, *of) for _ in range(size)]
        parts = (np.stack([getattr(each, name) for each in drawn]) for name in Sample._fields[:3])
        return cls(*parts)


def variant_of(name: str) -> Variant:
    """Returns the variant `name`, from `MIDDLE` or the package's released variants."""
    return MIDDLE[name] if name in MIDDLE else get_variant(name)


def facts(module: str, words: list[str]) -> dict[str, Any]:
    """Returns the head of a results file: command (`module`, `words`), date, machine, versions."""
    models = [
        line.partition(":")[2].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    names = ("jax", "jaxlib", "flax", "torch", "transformers")
    return {
        "command": " ".join([f"python -m benchmarks.{module}", *words]),
        "date": str(datetime.date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {models[0]}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


class Measured(NamedTuple):
    """The times of one call.

    Attributes:
      others: mean number of cores that other processes kept busy.
      wall: wall seconds.
      own: processor seconds of this process.
      value: the result of the call.
    """

    others: float
    wall: float
    own: float
    value: Any = None


def measure(call: Callable[[], object]) -> Measured:
    """Calls `call` and returns its times and its result."""
    busy, own, start = _busy_seconds(), sum(os.times()[:2]), time.perf_counter()
    value = call()
    wall, own = time.perf_counter() - start, sum(os.times()[:2]) - own
    return Measured(max((_busy_seconds() - busy - own) / wall, 0.0), wall, own, value)


def _busy_seconds() -> float:
    """Returns the processor seconds that all processes of this machine have used."""
    fields = pathlib.Path("/proc/stat").read_text().split(None, 9)[1:9]
    user, nice, system, _, _, irq, soft, _ = map(int, fields)
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def seconds(call: Callable[[], object], repeats: int, warm_up: int = 2) -> dict[str, float]:
    """Returns median, minimum and maximum wall seconds of `call`, which must block until done."""
    for _ in range(warm_up):
        call()
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return {"median": statistics.median(took), "min": min(took), "max": max(took)}
