"""Copies of arrays in the host's memory, made while the devices work on."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array


def copy_to_host(leaves: Mapping[Any, Array], kept: dict[Any, np.ndarray]) -> dict[Any, np.ndarray]:
    """The host's copies of arrays that this process holds.

    Copies of a CPU's arrays are `kept` until those of the next save take their place: the pages of
    fresh memory would have to be fetched, which takes longer than the copying.
    """
    on_cpu = jax.default_backend() == "cpu"
    if not on_cpu:
        for leaf in leaves.values():  # all under way, before the first is waited for
            leaf.copy_to_host_async()
    copies: dict[Any, np.ndarray] = {}
    for path, leaf in leaves.items():
        copies[path] = np.asarray(leaf)
        if on_cpu:  # a view of the buffer, which the next step takes over
            kept.setdefault(path, np.empty_like(copies[path]))
            np.copyto(kept[path], copies[path])
            copies[path] = kept[path]
    return copies
