"""Weight-only quantisation: kernels of the vision tower and the language model in int8 or int4.

    kernel  [D, ...]   ->   {"q": whole numbers [D, ...], "scale": float32, as many axes}

    int8    one scale for each output channel: the axes that a product sums over have size 1
    int4    one scale for each group of up to `GROUP` weights along the last summed axis, or of
            more where only a few would divide it; `q` is
            uint8 with the weights 2i and 2i + 1 of that axis, each plus 8, in one byte, the first
            in its lower half; an axis of odd length keeps a byte for each

Rounding is symmetric: weight = q * scale, with the largest weight of a channel or group at 127 or
7. Products are computed in the model's dtype (`dense.quantised_product`): the weights are smaller
to hold and to read, the results nearly the same. On GPUs a single row, as in greedy decoding, is
multiplied by the whole numbers themselves (`row_product`): no wide copy of a kernel is made.

The output kernels of T5's feed-forwards have a third part, `input_scale` [M, 1]: weight = q * scale
* input_scale. Their inputs have the largest outliers, and an input of thousands meets weights so
small that beside the largest one of a channel they would round to 0. So each input first gets a
scale of its own, a power of two, by which the input is multiplied without rounding.

Only the kernels of attention and feed-forwards in the layers of these two towers are quantised.
Left as they are: norms, biases, embeddings, heads, the patch convolution, the Q-Former and the
projector, whose few weights matter more. Checkpoints keep their dtype: kernels are quantised when
they are loaded.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip.models.variants import QUANTISED, Variant

TOWERS = ("vision", "llm")
GROUP = 128  # weights that share a scale in int4, where the axis allows it
SMALLEST = 32  # in smaller groups, scales of 4 bytes would outgrow the weights of half a byte
_PARTS = 32  # into which `row_product` cuts a kernel with one scale for each channel
LARGEST: dict[str, int] = dict(zip(QUANTISED, (127, 7), strict=True))  # of the whole numbers
DTYPES: dict[str, Any] = {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8)}  # of `q`

_KERNEL = re.compile(
    r"(?P<tower>vision|llm)/((encoder|decoder)/)?layers/(\d+/)?"
    r"((cross_)?attention/(query|key|value|out)|mlp/(gate|in|out))/kernel"
)

_WITH_INPUT_SCALE = re.compile(r"llm/(encoder|decoder)/layers/(\d+/)?mlp/out/kernel")

Kernel = dict[str, Any]  # {"q": ..., "scale": ...}


def check_towers(towers: Sequence[str], trainable: Sequence[str] = ()) -> None:
    """Raises a ValueError that names each of `towers` that cannot be quantised.

    Those of `TOWERS` can, unless they are in `trainable`, the top-level trees that are trained.
    """
    wrong = [f"{each}: it is none of {', '.join(TOWERS)}" for each in towers if each not in TOWERS]
    wrong += [
        f"{each}: it is trained, and whole numbers have no gradient"
        for each in towers
        if each in TOWERS and each in trainable
    ]
    if wrong:
        raise ValueError(f"cannot be quantised: {'; '.join(wrong)}")


def frozen_towers(variant: Variant, trainable: Sequence[str]) -> tuple[str, ...]:
    """Returns the towers of a model that are frozen and can be quantised.

    `trainable` are the top-level trees that are trained.

    Raises:
        ValueError: there is none.
    """
    present = [tower for tower in TOWERS if tower != "llm" or variant.llm is not None]
    towers = tuple(tower for tower in present if tower not in trainable)
    if not towers:
        check_towers(present, trainable)
    return towers


def is_quantised(path: str, towers: Sequence[str] = TOWERS) -> bool:
    """Returns True if the leaf at `path` is a kernel of `towers` that is to be quantised.

    A path is the leaf's keys in the tree of parameters, joined by slashes:
    `llm/layers/mlp/in/kernel`.
    """
    match = _KERNEL.fullmatch(path)
    return match is not None and match["tower"] in towers


def quantise(path: str, kernel: Any, form: str) -> dict[str, np.ndarray]:
    """Returns the parts of a quantised kernel: `q`, `scale` and, for some paths, `input_scale`.

    `path`, as in `is_quantised`, tells which axes are summed over. `form` is "int8" or "int4".
    `kernel` is an array, or anything that is sliced like one; layers of a stack are quantised one
    by one.

    Raises:
        ValueError: a weight is not finite, or there are no weights.
    """
    _require_weights(path, kernel.shape)
    summed, whole = _axes(path)
    if len(kernel.shape) == whole:
        return _quantise_one(path, np.asarray(kernel[...]), summed, form)
    layers = [_quantise_one(path, np.asarray(kernel[n]), summed, form) for n in range(len(kernel))]
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}


def _require_weights(path: str, shape: Sequence[int]) -> None:
    """Raises a ValueError if a kernel of this shape has no weights."""
    if 0 in shape:
        raise ValueError(
            f"{path} has the shape {tuple(shape)}, which holds no weights: leave quantise out"
        )


def _quantise_one(path: str, kernel: np.ndarray, summed: int, form: str) -> dict[str, np.ndarray]:
    wide, groups = kernel.astype(np.float32), _groups(kernel.shape, summed, form)
    more = {}
    if _WITH_INPUT_SCALE.fullmatch(path):
        more["input_scale"] = _input_scale(wide)
        wide = wide / more["input_scale"]
    parts = [(count, size // count) for count, size in zip(groups, kernel.shape, strict=True)]
    split = wide.reshape([length for part in parts for length in part])
    inner = tuple(range(1, split.ndim, 2))
    scale = np.abs(split).max(axis=inner, keepdims=True) / LARGEST[form]
    if not np.isfinite(scale).all():
        raise ValueError(f"{path} has weights that are not finite, so it cannot be quantised")
    scale[scale == 0] = 1.0  # all weights are 0
    q = np.rint(split / scale).reshape(kernel.shape).astype(np.int8)
    q = _pack(q, summed - 1) if form == "int4" else q
    return {"q": q, "scale": scale.reshape(groups), **more}


def _input_scale(kernel: np.ndarray) -> np.ndarray:
    """Returns the float32 scale `[M, 1]` of each input of a kernel [M, D], a power of two.

    It is the size of the input's largest weight beside the largest of all; at most 1.
    """
    largest = np.abs(kernel).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        powers = np.rint(np.log2(largest / (largest.max() or 1.0)))
    return np.exp2(np.where(np.isfinite(powers), powers, 0)).astype(np.float32)


def _pack(q: np.ndarray, axis: int) -> np.ndarray:
    """Returns int4 weights as bytes, two in each along `axis`, or one if its length is odd."""
    raised = (q + 8).astype(np.uint8)
    if q.shape[axis] % 2:
        return raised
    first, second = (np.take(raised, range(n, q.shape[axis], 2), axis) for n in (0, 1))
    return first | second << 4


def packed_shape(shape: Sequence[int], summed: int, form: str) -> tuple[int, ...]:
    """Returns the shape of `q` for a kernel [D, ...] whose first `summed` axes are summed over.

    `form` is "int8" or "int4".
    """
    halves = form == "int4" and shape[summed - 1] % 2 == 0
    return tuple(n // 2 if halves and axis == summed - 1 else n for axis, n in enumerate(shape))


def shapes(tree: Mapping[str, Any], form: str, towers: Sequence[str] = TOWERS) -> dict[str, Any]:
    """Returns a tree of shapes with the kernels of `towers` as `quantise` makes them.

    `tree` is a nested dict of arrays or `jax.ShapeDtypeStruct`s, `form` "int8" or "int4".
    """

    def change(node: Any, path: str) -> Any:
        if isinstance(node, Mapping):
            return {name: change(each, f"{path}/{name}") for name, each in node.items()}
        if not is_quantised(path[1:], towers):
            return node
        _require_weights(path[1:], node.shape)
        summed, whole = _axes(path)
        stack = node.shape[: len(node.shape) - whole]
        kernel = node.shape[len(stack) :]
        groups = _groups(kernel, summed, form)
        whole_numbers = (*stack, *packed_shape(kernel, summed, form))
        q = jax.ShapeDtypeStruct(whole_numbers, DTYPES[form])
        parts = {"q": q, "scale": jax.ShapeDtypeStruct((*stack, *groups), jnp.float32)}
        if _WITH_INPUT_SCALE.fullmatch(path[1:]):
            own = jax.ShapeDtypeStruct((*stack, kernel[0], 1), jnp.float32)
            parts["input_scale"] = own
        return parts

    return change(tree, "")


def is_scale(path: str) -> bool:
    """Returns True for the path of the scales of a quantised kernel, which stay float32."""
    return path.endswith(("kernel/scale", "kernel/input_scale"))


def form_of(params: Any) -> str | None:
    """Returns the form, "int8" or "int4", of a tree's quantised kernels; None if it has none."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
    return next((form for form, dtype in DTYPES.items() if dtype in dtypes), None)


def expand(q: jax.Array, scale: jax.Array, shape: Sequence[int], summed: int) -> jax.Array:
    """Returns the float32 weights `q` * `scale`, of the `shape` that the kernel had before.

    A product with the kernel sums over its first `summed` axes.
    """
    if q.dtype == DTYPES["int4"]:
        if q.shape != tuple(shape):
            halves = jnp.stack([q & 15, q >> 4], axis=summed)
            q = halves.reshape(shape)
        q = q.astype(jnp.int8) - 8
    parts = [(count, size // count) for count, size in zip(scale.shape, q.shape, strict=True)]
    split = q.reshape([length for part in parts for length in part]).astype(jnp.float32)
    wide = scale.reshape([length for count in scale.shape for length in (count, 1)])
    return (split * wide).reshape(q.shape)


def row_product(
    x: jax.Array, q: jax.Array, scale: jax.Array, shape: Sequence[int], summed: int
) -> jax.Array:
    """Returns one row `x` times a kernel that had `shape` before it was quantised.

    The result is float32 `shape[summed:]`. `x`, of any shape, has as many numbers as the kernel's
    first `summed` axes, which are summed over: first within groups of inputs, whose sums are then
    scaled and added. XLA for GPUs reads whole numbers, makes them wide and adds them in one kernel;
    without Triton, a product would write a wide copy first.
    """
    outer, groups = math.prod(shape[summed:]), math.prod(scale.shape[:summed])
    rows = q.size // outer
    parts = groups if groups > 1 else max(n for n in range(1, _PARTS + 1) if rows % n == 0)
    held = math.prod(shape[:summed]) // rows  # weights in a number of `q`
    x, q = x.astype(jnp.float32).reshape(rows, held), q.reshape(rows, outer)
    products = []
    for n in range(held):
        weights = q if q.dtype == DTYPES["int8"] else (q >> 4 * n & 15).astype(jnp.int8) - 8
        products.append(x[:, n, None] * weights.astype(jnp.float32))
    # Groups are split off late: XLA would copy a kernel in three axes to a layout of its own.
    total = functools.reduce(jnp.add, products).reshape(parts, -1, outer)
    sums = total.sum(axis=1) * scale.reshape(groups, outer)
    return sums.sum(axis=0).reshape(shape[summed:])


def has_row_product(q: Any, scale: Any, shape: Sequence[int], summed: int) -> bool:
    """Tells whether `row_product` takes a kernel: no packed byte holds weights of two groups."""
    rows, groups = q.size // math.prod(shape[summed:]), math.prod(scale.shape[:summed])
    return rows % groups == 0


def _axes(path: str) -> tuple[int, int]:
    """Returns (axes that a product with the kernel sums over, all axes without that of layers)."""
    if "attention/" not in path:
        return 1, 2  # [D, M]
    return (2, 3) if path.endswith("/out/kernel") else (1, 3)  # [N, K, D] or [D, N, K]


def _groups(shape: Sequence[int], summed: int, form: str) -> list[int]:
    """Returns the number of scales along each axis of a kernel whose first axes are summed over."""
    if form == "int8":
        return [1] * summed + list(shape[summed:])
    last = shape[summed - 1]
    sizes = [size for size in range(1, last + 1) if last % size == 0]
    group = max(size for size in sizes if size <= GROUP)
    if group < SMALLEST and group < last:  # such as 2 of 2 x 131
        group = min(size for size in sizes if size > GROUP or size == last)
    return [*shape[: summed - 1], last // group, *shape[summed:]]
