"""Transforms of a PyTorch tensor to a leaf (parameter) of ours and back.

They only transpose and reshape, so no bit changes. N heads of width K, model width D, C channels:

    linear           [out, in]          <-> [in, out]
    patches          [D, C, h, w]       <-> [h, w, C, D]
    attention_in     [N*K, D]           <-> [D, N, K]      query, key, value kernels
    attention_bias   [N*K]              <-> [N, K]
    attention_out    [D, N*K]           <-> [N, K, D]
    with_axes        [P, D]             <-> [1, P, D]
    identity         no change
"""

import dataclasses
from collections.abc import Callable

import numpy as np

Move = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Two functions that undo each other: `forward` to our leaf, `backward` to the PyTorch tensor.

    Both return views where numpy can, without a copy.
    """

    name: str
    forward: Move
    backward: Move

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of our leaf for a source tensor's shape; a ValueError if none fits."""
        return self.forward(_empty(source)).shape

    def source_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the source tensor for the shape of our leaf."""
        return self.backward(_empty(ours)).shape


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.zeros((), np.uint8), shape)  # one byte, whatever the shape


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _flip(x: np.ndarray) -> np.ndarray:
    if x.ndim != 2:
        raise ValueError(f"found {x.ndim} axes, expected the two of a matrix")
    return x.T


identity = Transform("identity", _same, _same)
linear = Transform("linear", _flip, _flip)
patches = Transform("patches", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def with_axes(count: int) -> Transform:
    """Returns the transform that adds `count` axes of size 1 in front."""
    return Transform(
        "with_axes",
        lambda x: x.reshape((1,) * count + x.shape),
        lambda x: x.reshape(x.shape[count:]),
    )


def attention_in(heads: int) -> Transform:
    """Returns the transform of query, key and value weights, [heads * K, D] <-> [D, heads, K]."""
    return Transform(
        "attention_in",
        lambda x: _flip(x).reshape(x.shape[1], heads, -1),
        lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    )


def attention_bias(heads: int) -> Transform:
    """Returns the transform of query, key and value biases, [heads * K] <-> [heads, K]."""
    return Transform("attention_bias", lambda x: x.reshape(heads, -1), lambda x: x.reshape(-1))


def attention_out(heads: int) -> Transform:
    """Returns the transform of an attention's output weights, [D, heads * K] <-> [heads, K, D]."""
    return Transform(
        "attention_out",
        lambda x: _flip(x).reshape(heads, -1, x.shape[0]),
        lambda x: x.reshape(-1, x.shape[2]).T,
    )


BAND_BYTES = 2**19  # of the source: a band that stays in cache; 3-6 times faster than one copy


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies `source`, often a transposed view, bit by bit into `target` of the same shape.

    Both have dtypes of the same width. Large arrays are copied in bands of `BAND_BYTES`.
    """
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
