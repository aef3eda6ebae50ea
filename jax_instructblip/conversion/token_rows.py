"""Tensors that are made of two others: rows for added tokens, and differences with their base.

    WithMeanRows(head, 32003)    the head, and three rows more with the mean of its rows
    Sum(delta, base)             delta + base; rows that only the delta has are taken as they are
    TokenRows(base, rows, 32003) the base's embedding, mean rows, and the last rows from elsewhere

They have what the engine asks of a tensor in a file: `file`, `shape`, `dtype`, `nbytes`, `read`.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

_SAMPLE = 256  # rows


def with_mean_rows(array: np.ndarray, total: int, axis: int = 0) -> np.ndarray:
    """Returns the array with `total` rows along `axis`; added ones hold the mean of the others.

    The logit of a mean is never the largest one, so such a token is never generated.
    """
    lacking = total - array.shape[axis]
    if lacking <= 0:
        return array
    mean = array.mean(axis=axis, keepdims=True, dtype=np.float32).astype(array.dtype)
    return np.concatenate([array, *[mean] * lacking], axis=axis)


@dataclasses.dataclass(frozen=True)
class Derived:
    """A tensor with the dtype and file of `source`, one of the tensors that it is made of."""

    source: Any

    @property
    def file(self) -> Path:
        """The file of the source."""
        return self.source.file

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the source."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, here that of the source."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, part: int = 0, parts: int = 1) -> np.ndarray:
        """Returns the tensor, or piece `part` of `parts` equal ones along axis 0, as an array."""
        array = self._array()
        rows = array.shape[0] // parts
        return array[part * rows : (part + 1) * rows]

    def _array(self) -> np.ndarray:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class WithMeanRows(Derived):
    """The tensor `source` with rows added up to `total`, as `with_mean_rows` has them."""

    total: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, with all rows."""
        return (max(self.total, self.source.shape[0]), *self.source.shape[1:])

    def _array(self) -> np.ndarray:
        return with_mean_rows(self.source.read(), self.total)


@dataclasses.dataclass(frozen=True)
class TokenRows(WithMeanRows):
    """The embedding `source` with `total` rows, of which the last ones are `rows`, a tensor [n, D].

    Rows between these and the embedding's own hold the mean, as in `WithMeanRows`.
    """

    rows: Any

    def _array(self) -> np.ndarray:
        array = super()._array().copy()
        with np.errstate(over="ignore", invalid="ignore"):  # the converter reports what is infinite
            array[-self.rows.shape[0] :] = self.rows.read().astype(array.dtype)
        return array


@dataclasses.dataclass(frozen=True)
class Sum(Derived):
    """A delta (`source`) and its base, added in the delta's dtype as the original code adds them.

    The base is first rounded to that dtype. Where the delta has more rows than the base (those of
    added tokens), these rows are the delta's own.
    """

    base: Any

    def rounded_share(self) -> float:
        """Returns the share of sums that the dtype cannot hold exactly, among the first rows.

        It shows a wrong base. The difference of two near numbers is exact in their format, and so
        is the sum of that difference and the right base (Sterbenz). With another base, most sums
        have more digits than the format. Of half-precision weights (standard deviation 0.01 to
        0.05, tuned by 1e-5 to 1e-3), 0 to 2.5 % of the sums with the right base were rounded, and
        21 to 37 % with another one.
        """
        count = min(_SAMPLE, self.base.shape[0])
        delta, base = self.source.read()[:count], self.base.read()[:count]
        with np.errstate(over="ignore", invalid="ignore"):
            total = delta + base.astype(delta.dtype)
        exact = delta.astype(np.float64) + base.astype(np.float64)
        return float(np.mean(total.astype(np.float64) != exact))

    def _array(self) -> np.ndarray:
        delta = self.source.read()
        rows = self.base.shape[0]
        with np.errstate(over="ignore", invalid="ignore"):
            total = delta[:rows] + self.base.read().astype(delta.dtype)
        return total if total.shape == delta.shape else np.concatenate([total, delta[rows:]])
