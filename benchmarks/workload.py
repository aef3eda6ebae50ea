"""Workloads shared by the benchmarks: model sizes, text lengths, timers, FLOPs of a step."""

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

from jax_instructblip.models.released import get_variant
from jax_instructblip.models.variants import (
    LlamaConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)

VARIANTS = {
    "full": ("instructblip-flan-t5-xl", "instructblip-vicuna-7b"),
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
TRAIN_BATCH = {"instructblip-flan-t5-xl": 192, "instructblip-vicuna-7b": 128}  # the paper's


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of one sample, without the image's 257 patches and 32 queries."""

    instruction: int = 32  # Q-Former text
    prompt: int = 48  # instruction in the language model's tokens
    answer: int = 16  # target tokens
    new: int = 64  # generated tokens

    @classmethod
    def of(cls, variant: str) -> "Lengths":
        """Returns the lengths for a variant; short ones for tiny variants, which test the code."""
        return cls(8, 8, 4, 8) if variant.startswith("tiny") else cls()


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
    """

    others: float
    wall: float
    own: float


def measure(call: Callable[[], object]) -> Measured:
    """Calls `call` and returns its times."""
    busy, own, start = _busy_seconds(), sum(os.times()[:2]), time.perf_counter()
    call()
    wall, own = time.perf_counter() - start, sum(os.times()[:2]) - own
    return Measured(max((_busy_seconds() - busy - own) / wall, 0.0), wall, own)


def _busy_seconds() -> float:
    """Returns the processor seconds that all processes of this machine have used."""
    fields = pathlib.Path("/proc/stat").read_text().split(None, 9)[1:9]
    user, nice, system, _, _, irq, soft, _ = map(int, fields)
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def train_flops(variant: Variant, lengths: Lengths) -> float:
    """Returns the FLOPs that one training sample needs at least.

    Counted are the ViT's forward pass, the Q-Former's forward and backward passes, and the language
    model's forward pass and gradient of its inputs. A multiply-add counts 2. Only matrix products
    and attention count, causal attention half, the head only at target positions; no recomputation.
    """
    v, q, m = variant.vision, variant.qformer, variant.llm
    patches = v.tokens
    vision = 2 * v.layers * (4 * v.width**2 + 2 * v.width * v.mlp) * patches
    vision += 4 * patches**2 * v.width * v.layers
    vision += 2 * (patches - 1) * v.patch_size**2 * 3 * v.width

    t, cross = q.queries + lengths.instruction, q.layers // 2
    keys = 2 * cross * 2 * v.width * q.width * patches
    qformer = 2 * q.layers * (4 * q.width**2 + 2 * q.width * q.mlp) * t
    qformer += 2 * cross * 2 * q.width**2 * q.queries + keys
    qformer += 4 * t * t * q.width * q.layers + 4 * q.queries * patches * q.width * cross
    qformer += 2 * q.queries * q.width * q.llm_width
    trained = 3 * qformer - keys  # no gradient with respect to the image features

    seen, d = q.queries + lengths.prompt, m.width
    if isinstance(m, T5Config):
        inner, u = m.heads * m.head_width, lengths.answer
        mlp = 3 * d * m.mlp
        llm = 2 * m.encoder_layers * (4 * d * inner + mlp) * seen
        llm += 4 * seen**2 * inner * m.encoder_layers
        llm += 2 * m.decoder_layers * 2 * d * inner * seen
        llm += 2 * m.decoder_layers * (6 * d * inner + mlp) * u
        llm += (4 * u * seen + 2 * u**2) * inner * m.decoder_layers + 2 * m.vocab * d * u
    else:
        total = seen + lengths.answer
        llm = 2 * m.layers * (4 * d**2 + 3 * d * m.mlp) * total
        llm += 2 * total**2 * d * m.layers + 2 * m.vocab * d * lengths.answer
    return float(vision + trained + 2 * llm)


def decode_bytes(name: str) -> float:
    """Returns the bytes of bfloat16 weights that one decoding step reads, for any batch size."""
    m = get_variant(name).llm
    if isinstance(m, T5Config):
        layer = 6 * m.width * m.heads * m.head_width + 3 * m.width * m.mlp
        return 2.0 * (m.decoder_layers * layer + m.vocab * m.width)
    return 2.0 * (m.layers * (4 * m.width**2 + 3 * m.width * m.mlp) + m.vocab * m.width)


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
