"""The way from a PyTorch tensor to a leaf of ours, and back: permutations, so no bit changes.

linear           [out, in]          <-> [in, out]
patches          [D, C, h, w]       <-> [h, w, C, D]
attention_in     [N*K, D]           <-> [D, N, K]      query, key, value kernels
attention_bias   [N*K]              <-> [N, K]
attention_out    [D, N*K]           <-> [N, K, D]
with_axes        [P, D]             <-> [1, P, D]
identity
"""

import dataclasses
from collections.abc import Callable

import numpy as np

Move = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pair of views that undo each other; neither copies."""

    name: str
    forward: Move
    backward: Move

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of our leaf for a source tensor of this shape; ValueError where none fits."""
        return self.forward(_empty(source)).shape

    def source_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the source tensor for a leaf of ours."""
        return self.backward(_empty(ours)).shape


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.zeros((), np.uint8), shape)  # one byte, whatever the shape


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _flip(x: np.ndarray) -> np.ndarray:
    if x.ndim != 2:
        raise ValueError(f"a matrix is wanted, found {x.ndim} axes")
    return x.T


identity = Transform("identity", _same, _same)
linear = Transform("linear", _flip, _flip)
patches = Transform("patches", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def with_axes(count: int) -> Transform:
    """The transform that puts so many axes of size 1 before the others."""
    return Transform(
        "with_axes",
        lambda x: x.reshape((1,) * count + x.shape),
        lambda x: x.reshape(x.shape[count:]),
    )


def attention_in(heads: int) -> Transform:
    """The transform of a weight whose rows are heads one after another: it opens the head axis."""
    return Transform(
        "attention_in",
        lambda x: _flip(x).reshape(x.shape[1], heads, -1),
        lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    )


def attention_bias(heads: int) -> Transform:
    """The transform of the bias of those rows."""
    return Transform("attention_bias", lambda x: x.reshape(heads, -1), lambda x: x.reshape(-1))


def attention_out(heads: int) -> Transform:
    """The transform of a weight whose columns are heads one after another."""
    return Transform(
        "attention_out",
        lambda x: _flip(x).reshape(heads, -1, x.shape[0]),
        lambda x: x.reshape(-1, x.shape[2]).T,
    )


BAND_BYTES = 2**19  # of the source: a band that stays in cache; 3-6 times faster than one copy


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies a permuted view bit by bit into an array of the same shape and width, in bands."""
    unsigned = np.dtype(f"u{target.dtype.itemsize}")
    target, source = target.view(unsigned), source.view(unsigned)
    if source.ndim == 0 or source.nbytes <= BAND_BYTES or source.flags.c_contiguous:
        target[...] = source
        return
    axis = int(np.argmax(source.strides))
    step = max(1, BAND_BYTES // source.strides[axis])
    for start in range(0, source.shape[axis], step):
        band = (slice(None),) * axis + (slice(start, start + step),)
        target[band] = source[band]
