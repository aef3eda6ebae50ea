"""Devices to compile for, on a machine that does not have them.

A topology, such as `v5e:4x4`, names a kind of chip and the number of chips in each direction. Cloud
products are numbered differently (a `v5p-16` has 8 chips, a `v4-32` has 16).
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

MOST_CHIPS = 16_384  # in a topology; the largest pod has 8,960 chips


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for; `chip` has the figures of one device, or is None for CPUs."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None


def read_topology(name: str) -> Topology:
    """The devices of a topology such as `v5e:4x4` or `cpu:8`; does not start any TPU.

    Call this before JAX is used for anything else, because it sets the number of CPU devices.

    Raises:
        ValueError: an unknown kind or size, or the compiler for TPUs is not installed.
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
