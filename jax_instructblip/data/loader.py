"""From random-access batches to global arrays on devices, read ahead in the background."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from jax_instructblip.data.batch import slot_counts

# Keys of a batch that only the host looks at.
HOST_KEYS = ("truncated", "replaced")

DeviceBatch = dict[str, jax.Array]
Counts = dict[str, np.ndarray]


class Batches(Protocol):
    """Random access to the batches of a run, of which this host makes `rows` of `row_count`."""

    rows: np.ndarray
    row_count: int

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> dict[str, np.ndarray]: ...


def load(
    batches: Batches,
    sharding: NamedSharding,
    *,
    start: int = 0,
    threads: int = 2,
    ahead: int = 4,
    workers: int = 0,
) -> Iterator[tuple[DeviceBatch, Counts]]:
    """The batches from number `start` on, each with the host's own counts.

    Those are `HOST_KEYS`, and of `text` how many positions hold a token and how many there are.

    The place in the data is nothing but the number of the next batch. `threads` threads make
    batches, `ahead` of them before they are asked for; with `workers` > 0 as many processes do
    (a program that asks for them must have an `if __name__ == "__main__"`). Neither changes what
    a batch holds: each is made whole, from its number alone.
    """
    numbered = grain.MapDataset.source(cast(Any, batches))[start:]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    batches_ahead = numbered.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its own flags in the workers
            flags.FLAGS.mark_as_parsed()
        batches_ahead = batches_ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    waiting: collections.deque[tuple[DeviceBatch, Counts]] = collections.deque()
    for batch in batches_ahead:
        counts = {name: batch.pop(name) for name in HOST_KEYS} | {"text": slot_counts(batch)}
        waiting.append((put(batch, sharding, batches.rows, batches.row_count), counts))
        if len(waiting) > 1:  # one is on its way to the device while another is worked on
            yield waiting.popleft()
    yield from waiting


def put(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding, rows: np.ndarray, count: int
) -> DeviceBatch:
    """Global arrays `[count, ...]` of which this process holds `rows`, given as `batch`."""

    def to_devices(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            first = int(np.searchsorted(rows, start))
            return local[first : first + stop - start]

        return jax.make_array_from_callback((count, *local.shape[1:]), sharding, part)

    return {name: to_devices(value) for name, value in batch.items()}
