"""The conversion engine: applies rules to source tensors, and makes our parameters one at a time.

    Rule("vision_model.encoder.layers.{i}.mlp.fc1.weight", "vision/layers/mlp/in/kernel", linear,
         layers=range(39))

A leaf is one parameter of our network, named by its path. `make_plan` checks that every source
tensor is used, or dropped for a stated reason, and that every leaf is filled. All failures are
reported together, before anything is read or written.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jax_instructblip.conversion import transforms
from jax_instructblip.conversion.safetensors import DEQUANTISE, ConversionError, Tensor
from jax_instructblip.conversion.transforms import Transform

EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80_0000}
CHUNK = 2**22  # numbers that are checked at a time
FLOATS = {np.dtype(name) for name in ("float16", "float32", ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Fills one leaf from one source tensor, or from one of several equal parts of that tensor.

    With `layers` there is one source tensor per layer, and each fills one slice of the leaf.

    Attributes:
      source: name of the source tensor; with `layers` it has `{i}` in place of the layer's number.
      target: path of the leaf; with `layers` the leaf is stacked on axis 0 in their order.
      transform: transposes or reshapes the tensor into the leaf.
      layers: numbers of the layers.
      part: (k, n): piece k, counted from 0, of n equal pieces along the tensor's axis 0; other
        rules take the others.
    """

    source: str
    target: str
    transform: Transform
    layers: range | None = None
    part: tuple[int, int] = (0, 1)

    @property
    def keys(self) -> list[str]:
        """The names of the source tensors, in the order in which the leaf stacks them."""
        return _keys(self.source, self.layers)


@dataclasses.dataclass(frozen=True)
class Zeros:
    """A part of a source tensor that fills no leaf and must be zero; the export writes zeros.

    `part` and `layers` are as in `Rule`; the error message says the `reason`.
    """

    source: str
    reason: str
    part: tuple[int, int]
    layers: range | None = None

    @property
    def keys(self) -> list[str]:
        """The names of the source tensors, one a layer."""
        return _keys(self.source, self.layers)


@dataclasses.dataclass(frozen=True)
class Drop:
    """A source tensor that is left out, if it is there, for the stated reason.

    `{i}` stands for any number. With `same_as`, the name of another tensor, both must be equal bit
    by bit.
    """

    source: str
    reason: str
    same_as: str | None = None


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A source tensor that fills no leaf and must have fixed values; the export writes them.

    Attributes:
      source: its name.
      values: "identity" [n, n] or "zeros" [n].
      reason: what the error message says if it has others.
      like: path of the leaf [n] that has its size and dtype.
    """

    source: str
    values: str
    reason: str
    like: str

    @property
    def keys(self) -> list[str]:
        """The name of the source tensor, as a list of one."""
        return [self.source]

    def make(self, size: int, dtype: np.dtype) -> np.ndarray:
        """Returns the tensor, `[size, size]` or `[size]`, whose values `values` names."""
        return np.eye(size, dtype=dtype) if self.values == "identity" else np.zeros(size, dtype)


Entry = Rule | Zeros | Fixed | Drop


def _keys(source: str, layers: range | None) -> list[str]:
    return [source] if layers is None else [source.replace("{i}", str(i)) for i in layers]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf (parameter) that will be made: its rule, shape and dtype."""

    rule: Rule
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the leaf in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked conversion; iterating yields (path, array) of each leaf, made one at a time.

    Attributes:
      leaves: the leaves by path, sorted.
      dropped: the reason for each source tensor that is left out.
      tensors: the source tensors by name.
    """

    leaves: dict[str, Leaf]
    dropped: dict[str, str]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Size of all leaves in bytes."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (path, array) of each leaf; keeps no reference, so that the caller can free it."""
        for path in self.leaves:
            yield path, self.make(path)

    def make(self, path: str) -> np.ndarray:
        """Returns one leaf, read from its source tensors; peak memory is the leaf and one layer."""
        leaf = self.leaves[path]
        rule = leaf.rule
        leaf_array = np.empty(leaf.shape, leaf.dtype)
        for i, key in enumerate(rule.keys):
            piece = rule.transform.forward(self.tensors[key].read(*rule.part))
            transforms.copy(leaf_array if rule.layers is None else leaf_array[i], piece)
        return leaf_array


def make_plan(
    entries: Sequence[Entry], tensors: Mapping[str, Tensor], expected: Mapping[str, Any], title: str
) -> Plan:
    """Returns the plan that fills the leaves in `expected` from `tensors` by the rules `entries`.

    `expected` maps the path of each leaf to anything with a `shape`, `tensors` a source name to a
    tensor; `title` heads the error message.

    Raises:
        ConversionError: tensors are missing, left over, or of another shape or dtype; leaves are
            unfilled or unknown; or parts that should be zero or equal are not. All are listed.
    """
    failures: list[tuple[str, str]] = []  # (source key or target path, what is wrong)
    leaves: dict[str, Leaf] = {}
    parts: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for entry in entries:
        if isinstance(entry, Rule):
            for key in entry.keys:
                parts[key].add(entry.part)
            leaf = _leaf(entry, tensors, expected, failures)
            if entry.target in leaves:
                failures.append(
                    (entry.target, f"filled twice, the second time from {entry.source}")
                )
            if leaf is not None:
                leaves[entry.target] = leaf
        elif isinstance(entry, Zeros):
            for key in entry.keys:
                parts[key].add(entry.part)
                _check_zero(key, entry, tensors, failures)
        elif isinstance(entry, Fixed):
            parts[entry.source].add((0, 1))
            _check_fixed(entry, tensors, expected, failures)
    for key, used in parts.items():
        if key in tensors and {k for k, _ in used} != set(range(next(iter(used))[1])):
            failures.append((key, f"only its parts {sorted(used)} are used"))
    dropped = _dropped(entries, tensors, parts.keys(), failures)
    ruled = {entry.target for entry in entries if isinstance(entry, Rule)}
    for path in expected.keys() - ruled:
        failures.append((path, f"no rule fills this leaf of shape {list(expected[path].shape)}"))
    if failures:
        raise ConversionError(title, collapse(failures))
    return Plan({path: leaves[path] for path in sorted(leaves)}, dropped, tensors)


def _leaf(
    rule: Rule,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Any],
    failures: list[tuple[str, str]],
) -> Leaf | None:
    if rule.target not in expected:
        failures.append((rule.target, f"the network has no such leaf (for {rule.source})"))
        return None
    shape = tuple(expected[rule.target].shape)
    before = len(failures)
    inner = shape if rule.layers is None else shape[1:]
    if rule.layers is not None and shape[:1] != (len(rule.layers),):
        failures.append(
            (rule.target, f"{list(shape)} expected, {len(rule.layers)} layers in the rule")
        )
        return None
    first, *rest = rule.transform.source_shape(inner) or (1,)
    wanted = (first * rule.part[1], *rest) if inner else ()
    dtypes: dict[np.dtype, list[str]] = defaultdict(list)
    for key in rule.keys:
        if key not in tensors:
            failures.append((key, f"missing: {rule.target} needs it, shape {list(wanted)}"))
        elif tensors[key].shape != wanted:
            failures.append(
                (
                    key,
                    f"for {rule.target}: expected shape {list(wanted)}, "
                    f"found {list(tensors[key].shape)}",
                )
            )
        elif tensors[key].dtype not in FLOATS:
            failures.append(
                (
                    key,
                    f"for {rule.target}: expected float32, float16 or bfloat16, "
                    f"found {tensors[key].dtype}{_why(tensors[key].dtype)}",
                )
            )
        else:
            dtypes[tensors[key].dtype].append(key)
    if len(dtypes) > 1:
        by_dtype = "; ".join(f"{dtype}: {', '.join(keys)}" for dtype, keys in dtypes.items())
        failures.append((rule.target, f"its layers have different dtypes: {by_dtype}"))
    return Leaf(rule, shape, next(iter(dtypes))) if len(failures) == before else None


def is_finite(array: np.ndarray) -> bool:
    """Tells whether no number is NaN or infinite, without a copy of the array.

    The dtype is a key of `EXPONENTS`. Only the bits of the exponent are compared, in chunks; they
    are all set in NaN and infinity.
    """
    mask = EXPONENTS[array.dtype.name]
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    parts = (bits[at : at + CHUNK] for at in range(0, bits.size, CHUNK))
    return not any(np.any((part & mask) == mask) for part in parts)


def _why(dtype: np.dtype) -> str:
    """Returns advice about a dtype that cannot be converted."""
    return ": save it in float32" if dtype.kind == "f" else f" (quantised weights? {DEQUANTISE})"


def _check_zero(
    key: str, entry: Zeros, tensors: Mapping[str, Tensor], failures: list[tuple[str, str]]
) -> None:
    part, parts = entry.part
    if key not in tensors or tensors[key].shape[0] % parts:
        return  # the rule for another part reports the failure
    size = tensors[key].shape[0] // parts
    values = tensors[key].read(part, parts).astype(np.float32)
    if np.any(values != 0) or np.any(np.isnan(values)):
        failures.append(
            (
                key,
                f"elements {part * size} to {(part + 1) * size - 1} must be zero, found up to "
                f"{np.max(np.abs(values)):.6g}: {entry.reason}",
            )
        )


def _check_fixed(
    entry: Fixed,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Any],
    failures: list[tuple[str, str]],
) -> None:
    wanted = entry.make(expected[entry.like].shape[0], np.dtype(np.float32))
    if entry.source not in tensors:
        failures.append((entry.source, f"missing: expected {entry.values} {list(wanted.shape)}"))
        return
    values = tensors[entry.source].read().astype(np.float32)
    if not np.array_equal(values, wanted):
        failures.append((entry.source, f"expected {entry.values}, found others: {entry.reason}"))


def _dropped(
    entries: Iterable[Entry],
    tensors: Mapping[str, Tensor],
    used: Iterable[str],
    failures: list[tuple[str, str]],
) -> dict[str, str]:
    """Returns name -> reason for the source tensors that a `Drop` in `entries` leaves out.

    `used` has the names that rules use. Appended to `failures`: a tensor that is neither used nor
    dropped, and one that differs from the tensor it should equal.
    """
    drops = [
        (re.compile(re.escape(entry.source).replace(r"\{i\}", r"\d+")), entry)
        for entry in entries
        if isinstance(entry, Drop)
    ]
    used = set(used)
    dropped = {}
    for key, tensor in tensors.items():
        if key in used:
            continue
        entry = next((entry for pattern, entry in drops if pattern.fullmatch(key)), None)
        if entry is None:
            failures.append((key, f"unexpected: no rule uses it, shape {list(tensor.shape)}"))
            continue
        dropped[key] = entry.reason
        if entry.same_as is not None and not _equal(tensor, tensors.get(entry.same_as)):
            failures.append((key, f"differs from {entry.same_as}, though {entry.reason}"))
    return dropped


def _equal(a: Tensor, b: Tensor | None) -> bool:
    if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return np.array_equal(a.read().view(np.uint8), b.read().view(np.uint8))


def collapse(failures: list[tuple[str, str]]) -> list[str]:
    """Returns failures, pairs (name, what is wrong), as sorted lines.

    Names that differ only in a layer's number share a line, if the same is wrong with them:
    `layers.{0,1,2}.mlp.fc1.weight: missing`.
    """
    groups: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for name, text in failures:
        words = re.split(r"(?<=\.)(\d+)(?=\.)", name)  # odd items are the numbers
        groups[text, *words[::2]].append(words[1::2])
    lines = []
    for (text, *words), numbers in sorted(groups.items()):
        columns = [sorted(set(column), key=int) for column in zip(*numbers, strict=True)]
        whole = len(numbers) == math.prod(map(len, columns))
        for column in [columns] if whole else [[[n] for n in row] for row in numbers]:
            shown = [n[0] if len(n) == 1 else "{" + ",".join(n) + "}" for n in column]
            name = "".join(a + b for a, b in zip(words, [*shown, ""], strict=True))
            lines.append(f"{name}: {text}")
    return sorted(lines)
