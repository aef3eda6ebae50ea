"""Devices that programs can be compiled for on a machine without them.

`v5e:4x4` names what the compiler calls a topology: a kind of chip and how many of them stand in
each direction. Products of clouds count otherwise (a `v5p-16` has 8 chips, a `v4-32` has 16).
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from jax_instructblip import tpu_compiler
from jax_instructblip.planning.chips import CHIPS, Chip, known

MOST_CHIPS = 16_384  # the largest pod has 8,960


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for; `chip` is None for a CPU, of which nothing is known."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None


def read_topology(name: str) -> Topology:
    """The devices of `v5e:4x4` or `cpu:8`; nothing of a TPU is started.

    To be called before JAX is used for anything else: a CPU is told here how many devices it has.

    Raises:
        ValueError: the name is of no known kind or size, or the compiler of TPUs is not installed.
    """
    kind, _, size = name.partition(":")
    if re.fullmatch(r"\d+(x\d+)*", size) and (len(size) > 40 or _count(size) > MOST_CHIPS):
        raise ValueError(
            f"topology {name[:60]!r} has more than {MOST_CHIPS:,} chips: no pod has, and each is "
            "kept track of by itself"
        )
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        return Topology(name, _cpu_devices(int(size)), None)
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", size):
        near = difflib.get_close_matches(name, known(), n=1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise ValueError(f"unknown topology {name!r}{hint}. Known are {', '.join(known())}")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"to compile for {name} the compiler of TPUs is needed, also where there is no TPU: "
            "pip install -e '.[tpu]'"
        )
    chip, dimensions = CHIPS[kind], size.split("x")
    options: dict[str, Any] = dict(chip.options)
    if all(int(each) == 1 for each in dimensions):  # one chip of a host that has several
        options["chips_per_host_bounds"] = [1, 1, 1]
    _prepare()
    try:
        devices = topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"the compiler knows no {name} ({str(error).splitlines()[0]}); sizes of {kind} are "
            f"{', '.join(chip.sizes)}"
        ) from error
    return Topology(name, devices, chip)


def _count(size: str) -> int:
    return math.prod(map(int, size.split("x")))


def _prepare() -> None:
    """Lets the compiler be loaded where no TPU is, and beside another process that has it."""
    tpu_compiler.set_flags()
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # asks no cloud what machine this is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    for name, value in (
        ("TPU_MIN_LOG_LEVEL", "3"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        # Not of the topology, only of the machine that it believes to run on.
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def _cpu_devices(count: int) -> Sequence[Any]:
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has been used in this process: it has what it has
        pass
    devices = jax.devices()
    if len(devices) < count:
        raise ValueError(f"cpu:{count}: JAX has {len(devices)} devices here and was used before")
    return devices[:count]
