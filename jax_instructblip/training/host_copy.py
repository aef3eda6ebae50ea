"""Copies device arrays to host memory for a checkpoint, so that training can go on meanwhile."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array


def copy_to_host(leaves: Mapping[Any, Array], kept: dict[Any, np.ndarray]) -> dict[Any, np.ndarray]:
    """Returns host copies of the arrays `leaves`, all of which must be addressable by this process.

    On CPU, `kept` holds the destination buffers and is updated: the next call with the same keys
    overwrites them. Reused memory is faster, because the system must zero and map fresh pages. On
    other backends `kept` is ignored.
    """
    on_cpu = jax.default_backend() == "cpu"
    if not on_cpu:
        for leaf in leaves.values():  # start all transfers before waiting for the first
            leaf.copy_to_host_async()
    copies: dict[Any, np.ndarray] = {}
    for path, leaf in leaves.items():
        copies[path] = np.asarray(leaf)
        if on_cpu:  # np.asarray is a view of the device buffer, which the next step overwrites
            kept.setdefault(path, np.empty_like(copies[path]))
            np.copyto(kept[path], copies[path])
            copies[path] = kept[path]
    return copies
