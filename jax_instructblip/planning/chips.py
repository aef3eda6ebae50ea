"""The chips that steps can be planned for, TPUs and GPUs: figures of each, and sizes to ask for."""

import dataclasses
import functools

GIB = 2**30
EFFORTS = {  # the compiler's effort, by the names of `plan --effort`
    "quick": -1.0,  # the least effort: a third of the time, a plan of a little more memory
    "full": 0.0,  # as for a real run
}
# The share of a GPU's memory that JAX takes: by default, and at most, as CUDA itself needs the rest
# (the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION).
DEFAULT_SHARE, LARGEST_SHARE = 0.75, 0.95
PER_MACHINE = 8  # GPUs of one machine, joined by NVLink


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Figures of a GPU that XLA's CUDA compiler asks for.

    Attributes:
      total: bytes of memory, as CUDA reports them.
      capability: CUDA compute capability (major, minor).
      cores: number of streaming multiprocessors.
      units: float32 units of one of them.
      l2: bytes of the L2 cache.
      shared: bytes of shared memory of one multiprocessor.
    """

    total: int
    capability: tuple[int, int]
    cores: int
    units: int
    l2: int
    shared: int


@dataclasses.dataclass(frozen=True)
class Chip:
    """The maker's figures for one chip.

    Attributes:
      memory: bytes that a program may use: of a TPU's HBM (libtpu 0.0.42 keeps the rest for
        itself), or the share of a GPU's memory that JAX takes by default.
      flops: peak bfloat16 operations per second.
      bandwidth: bytes per second between memory and the chip.
      links: bytes per second between the chip and its neighbours, all links of one direction.
      clock: cycles per second; the compiler for TPUs states times in cycles.
      sizes: examples of sizes: TPU chips in each direction, as clouds offer them; numbers of GPUs.
      options: options (name, value) that the compiler for TPUs needs for this kind of chip.
      gpu: further figures of a GPU; None for a TPU.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float
    clock: float
    sizes: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()
    gpu: Gpu | None = None

    @property
    def most(self) -> float:
        """Bytes that a program may use if JAX is told to take the largest share of the memory."""
        return self.memory if self.gpu is None else self.gpu.total * LARGEST_SHARE


TPUS = {
    # A chip has two cores; `megacore` makes them one device.
    "v4": Chip(
        *(30.75 * GIB, 275e12, 1228e9, 300e9, 1.05e9),
        sizes=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x8x8", "8x8x16"),
        options=(("chip_config_name", "megacore"),),
    ),
    "v5e": Chip(
        *(15.75 * GIB, 197e12, 819e9, 200e9, 1.5e9),
        sizes=("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
    "v5p": Chip(
        *(95.74 * GIB, 459e12, 2765e9, 600e9, 1.75e9),
        sizes=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x8x8", "8x8x16"),
    ),
    "v6e": Chip(
        *(31.25 * GIB, 918e12, 1640e9, 448e9, 1.75e9),
        sizes=("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
}


def _gpu(gpu: Gpu, *, flops: float, bandwidth: float, links: float, clock: float) -> Chip:
    memory = gpu.total * DEFAULT_SHARE
    return Chip(memory, flops, bandwidth, links, clock, ("1", "8", "16"), gpu=gpu)


# Flops are those without sparsity, links are NVLink's.
_A100 = functools.partial(
    Gpu, capability=(8, 0), cores=108, units=64, l2=40 * 2**20, shared=164 * 2**10
)
_H100 = functools.partial(
    Gpu, capability=(9, 0), cores=132, units=128, l2=50 * 2**20, shared=228 * 2**10
)
_AMPERE = functools.partial(_gpu, flops=312e12, links=300e9, clock=1.41e9)
_HOPPER = functools.partial(_gpu, flops=989e12, links=450e9, clock=1.98e9)
GPUS = {  # SXM modules
    "a100-40": _AMPERE(_A100(int(39.39 * GIB)), bandwidth=1555e9),
    "a100-80": _AMPERE(_A100(int(79.25 * GIB)), bandwidth=2039e9),
    "h100": _HOPPER(_H100(int(79.14 * GIB)), bandwidth=3352e9),
    "h200": _HOPPER(_H100(int(139.8 * GIB)), bandwidth=4800e9),
}
CHIPS = {**TPUS, **GPUS}


def known() -> list[str]:
    """Names of topologies, such as `v5e:4x4` or `h100:8`, as examples; others compile, too."""
    return [f"{kind}:{size}" for kind, chip in CHIPS.items() for size in chip.sizes] + ["cpu:8"]
