"""Devices to compile for, on a machine that does not have them.

A topology of TPUs, such as `v5e:4x4`, names a kind of chip and the number of chips in each
direction. Cloud products are numbered differently (a `v5p-16` has 8 chips, a `v4-32` has 16). A
topology of GPUs, such as `h100:8`, names a kind and how many there are, at most eight a machine.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from jax_instructblip import tpu_compiler
from jax_instructblip.planning.chips import CHIPS, PER_MACHINE, Chip, known
from jax_instructblip.planning.gpu_target import COMPILER_OPTIONS, target_config

CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # either has the CUDA compiler
_NUMBER = r"[1-9]\d*"
MOST_CHIPS = 16_384  # in a topology; the largest pod has 8,960 chips


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for: JAX's descriptions of absent chips, or CPU devices of this process.

    `chip` has the figures of one device, or is None for CPUs. `options` are those that the compiler
    needs for these devices (`compile_job`).
    """

    name: str
    devices: Sequence[Any]
    chip: Chip | None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_topology(name: str) -> Topology:
    """The devices of a topology such as `v5e:4x4`, `h100:8` or `cpu:8`; starts no TPU or GPU.

    Call this before JAX is used for anything else, because it sets the number of CPU devices.

    Raises:
        ValueError: an unknown kind or size, or the compiler for these chips is not installed.
    """
    kind, _, size = name.partition(":")
    if re.fullmatch(r"\d+(x\d+)*", size) and (len(size) > 40 or _count(size) > MOST_CHIPS):
        raise ValueError(
            f"topology {name[:60]!r} has more than {MOST_CHIPS:,} chips: no pod has, and each is "
            "kept track of by itself"
        )
    if kind == "cpu" and re.fullmatch(_NUMBER, size):
        return Topology(name, _cpu_devices(int(size)), None)
    chip = CHIPS.get(kind)
    shape = rf"{_NUMBER}(x{_NUMBER})+" if chip is None or chip.gpu is None else _NUMBER
    if chip is None or not re.fullmatch(shape, size):
        near = difflib.get_close_matches(name, known(), n=1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise ValueError(f"unknown topology {name!r}{hint}. Known are {', '.join(known())}")
    if chip.gpu is not None:
        return Topology(name, _gpu_devices(name, chip, int(size)), chip, COMPILER_OPTIONS)
    return Topology(name, _tpu_devices(name, chip, size), chip)


def has_cuda() -> bool:
    """True if JAX's CUDA compiler is installed (extra `gpu`); it needs no GPU."""
    return any(importlib.util.find_spec(name) is not None for name in CUDA_PLUGINS)


def _count(size: str) -> int:
    return math.prod(map(int, size.split("x")))


def _tpu_devices(name: str, chip: Chip, size: str) -> Sequence[Any]:
    """Devices of TPUs with `size` chips in each direction; `name` is that of the topology."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"to compile for {name} the compiler of TPUs is needed, also where there is no TPU: "
            "pip install -e '.[tpu]'"
        )
    options: dict[str, Any] = dict(chip.options)
    if all(int(each) == 1 for each in size.split("x")):  # one chip of a host that has several
        options["chips_per_host_bounds"] = [1, 1, 1]
    _prepare()
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"the compiler knows no {name} ({str(error).splitlines()[0]}); sizes of "
            f"{name.partition(':')[0]} are {', '.join(chip.sizes)}"
        ) from error


def _gpu_devices(name: str, chip: Chip, count: int) -> Sequence[Any]:
    """Devices of `count` GPUs, eight a machine if there are more; `name` is the topology's."""
    if not has_cuda():
        raise ValueError(
            f"to compile for {name} JAX's CUDA compiler is needed, also where there is no GPU: "
            "pip install -e '.[gpu]'"
        )
    if count > PER_MACHINE and count % PER_MACHINE:
        raise ValueError(
            f"topology {name!r}: machines have {PER_MACHINE} GPUs each, so the number is at most "
            f"{PER_MACHINE} or a multiple of it"
        )
    assert chip.gpu is not None
    jax.config.update("jax_platforms", "cpu")
    here = min(count, PER_MACHINE)
    return topologies.get_topology_desc(
        "",
        "cuda",
        target_config=target_config(name.partition(":")[0], chip, chip.gpu),
        topology=f"1x{count // here}x{here}",
    ).devices


def _prepare() -> None:
    """Sets the environment so that the TPU compiler loads on a machine without a TPU.

    Several processes may then load the compiler at the same time.
    """
    tpu_compiler.set_flags()
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # asks no cloud what machine this is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    for name, value in (
        ("TPU_MIN_LOG_LEVEL", "3"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        # The machine that the compiler assumes to run on; the topology does not depend on it.
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def _cpu_devices(count: int) -> Sequence[Any]:
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX was used before in this process, and keeps the devices it has
        pass
    devices = jax.devices()
    if len(devices) < count:
        raise ValueError(f"cpu:{count}: JAX has {len(devices)} devices here and was used before")
    return devices[:count]
