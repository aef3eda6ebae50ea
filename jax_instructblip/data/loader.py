"""Loads batches in the background and puts them on the devices as global arrays."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from jax_instructblip.data.batch import sample_sizes, slot_counts

# Keys of a batch that stay on the host.
HOST_KEYS = ("truncated", "replaced")

DeviceBatch = dict[str, jax.Array]
Counts = dict[str, np.ndarray]


class Batches(Protocol):
    """Random access to the batches of a run: `batches[step]` is this host's part of a global batch.

    Besides the keys of `spec.py` each batch has those of `HOST_KEYS`. `row_count` is the number of
    rows of the global batch, `rows` the numbers of this host's rows.
    """

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
    """Yields (batch on the devices, counts of this host) from batch number `start` on.

    The counts are numpy arrays: `truncated` and `replaced` (`HOST_KEYS`) as the batch had them;
    `text`, the number of token positions in use and of all positions (`batch.slot_counts`);
    `sizes`, the images, instruction ids, slots and targets of each sample (`batch.sample_sizes`);
    and `row`, the widths of a row, slots and targets, none for pairs of BLIP-2's first stage.

    `sharding` splits axis 0 of all arrays. To resume, give the number of the next batch as `start`:
    a batch is a function of its number alone. `threads` threads of this process make batches, at
    most `ahead` of them in advance; with `workers` > 0 that many processes make them instead (the
    main program then needs an `if __name__ == "__main__"`). None of these numbers changes the
    content of a batch.
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
        counts = {name: batch.pop(name) for name in HOST_KEYS}
        counts |= {"text": slot_counts(batch), "sizes": sample_sizes(batch)}
        counts["row"] = np.array([batch[n].shape[1] for n in ("slots", "targets") if n in batch])
        waiting.append((put(batch, sharding, batches.rows, batches.row_count), counts))
        if len(waiting) > 1:  # keep one batch in transfer while another is used
            yield waiting.popleft()
    yield from waiting


def put(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding, rows: np.ndarray, count: int
) -> DeviceBatch:
    """Returns global arrays `[count, ...]`, made from this process's rows of them.

    `batch` holds local arrays `[len(rows), ...]`; `rows` are their row numbers in the global batch,
    in rising order. `sharding` splits axis 0 of all arrays.
    """

    def to_devices(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            first = int(np.searchsorted(rows, start))
            return local[first : first + stop - start]

        return jax.make_array_from_callback((count, *local.shape[1:]), sharding, part)

    return {name: to_devices(value) for name, value in batch.items()}
