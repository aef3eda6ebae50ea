"""Cross-entropy of the target tokens, of their logits or of the factors of these."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from jax_instructblip.data.spec import IGNORE
from jax_instructblip.models.dense import precision_of
from jax_instructblip.models.layers import BATCH_AXES

CHUNK = 1_024  # targets of a device whose logits are computed at once: enough to keep it busy


def cross_entropy(logits: Array, targets: Array, smoothing: float = 0.0) -> Array:
    """Returns the sum of -log p(target) over all valid targets, a float32 scalar.

    `logits` are `[G, A, V]` (rows, targets of a row, vocabulary); `targets` are ids `[G, A]`, with
    `IGNORE` on padding. `smoothing` is label smoothing as in PyTorch: this share of each target's
    weight is spread evenly over all ids. The caller divides the sum by `count_targets` of the
    *global* batch, so that the loss does not depend on the number of devices.
    """
    asked = targets != IGNORE
    logits = logits.astype(jnp.float32)
    # logsumexp - logit keeps one [G, A, V] array for the gradient; log_softmax would keep two.
    chosen = jnp.take_along_axis(logits, jnp.where(asked, targets, 0)[..., None], axis=-1)[..., 0]
    if smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * logits.mean(axis=-1)
    surprise = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.where(asked, surprise, 0.0).sum()


def count_targets(targets: Array) -> Array:
    """Returns the number of targets that are not `IGNORE`, a float32 scalar."""
    return (targets != IGNORE).sum(dtype=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 4))
def word_loss(x: Array, kernel: Array, axes: str, targets: Array, dtype: Any) -> Array:
    """Returns `cross_entropy` of `word_logits(x, kernel, axes, dtype)`, without the whole logits.

    `x` is `[G, A, D]`, the kernel `[D, V]` or `[V, D]` as `axes` ("DV" or "VD") says, and `targets`
    are ids `[G, A]`.

    A device computes the logits of about `CHUNK` targets at a time, the same ones of each of its
    rows, and their gradient with them, so that float32 logits of all targets are never held. The
    products are those of all logits at once and their gradient, each of them once; their factors
    have `dtype`, in the gradient, too. If the kernel is trained the gradient of all logits is kept
    in `dtype` until the end: the kernel's is then one product, summed over devices once.
    """
    return _chunks(x, kernel, axes, targets, dtype, ())[0]


def _forward(
    x: Any, kernel: Any, axes: str, targets: Any, dtype: Any
) -> tuple[Array, tuple[Any, ...]]:
    keep = ("x", "logits") if kernel.perturbed else ("x",)
    total, gradients = _chunks(x.value, kernel.value, axes, targets.value, dtype, keep)
    inputs = (x.value, kernel.value) if kernel.perturbed else ()
    like = jnp.zeros(0, x.value.dtype), jnp.zeros(0, kernel.value.dtype)
    return total, (gradients, inputs, like)


def _backward(
    axes: str, dtype: Any, kept: tuple[Any, ...], scale: Array
) -> tuple[Array, Array | None, None]:
    gradients, inputs, (like, like_kernel) = kept
    of_x = (gradients["x"] * scale).astype(like.dtype)
    if not inputs:
        return of_x, None, None
    of_kernel = jnp.einsum(
        f"GAD,GAV->{axes}",
        inputs[0].astype(dtype),
        gradients["logits"],
        precision=precision_of(dtype),
        preferred_element_type=jnp.float32,
    )
    return of_x, (of_kernel * scale).astype(like_kernel.dtype), None


word_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunks(
    x: Array, kernel: Array, axes: str, targets: Array, dtype: Any, keep: tuple[str, ...]
) -> tuple[Array, dict[str, Array]]:
    """The loss, and its gradients of `keep` ("x", "logits"), one chunk of targets at a time."""
    kernel = _gathered(kernel.astype(dtype), axes.index("D"))
    product = functools.partial(
        jnp.einsum, precision=precision_of(dtype), preferred_element_type=jnp.float32
    )

    def chunk(total: Array, part: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
        x, targets = part
        logits = product(f"GAD,{axes}->GAV", x, kernel)
        asked, target = (targets != IGNORE)[..., None], jnp.arange(logits.shape[-1])
        target = target[None, None] == targets[..., None]
        peak = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        chosen = jnp.where(target, logits, 0).sum(axis=-1, keepdims=True)
        total += jnp.where(asked, peak - chosen, 0.0).sum()
        if not keep:
            return total, {}
        slope = jnp.where(asked, jnp.exp(logits - peak) - target, 0).astype(dtype)
        own = {"x": product(f"GAV,{axes}->GAD", slope, kernel).astype(dtype), "logits": slope}
        return total, {name: own[name] for name in keep}

    x, rows, length = x.astype(dtype), *targets.shape
    count = min(targets.size // _batch_shards() // CHUNK, length)
    if count < 2:
        return chunk(jnp.zeros(()), (x, targets))
    width = math.ceil(length / count)
    count = math.ceil(length / width)
    missing = ((0, 0), (0, count * width - length))
    divide = lambda leaf: leaf.reshape(rows, count, width, *leaf.shape[2:]).swapaxes(0, 1)
    parts = (
        divide(jnp.pad(x, (*missing, (0, 0)))),
        divide(jnp.pad(targets, missing, constant_values=IGNORE)),
    )
    total, gradients = jax.lax.scan(chunk, jnp.zeros(()), parts)
    join = lambda leaf: leaf.swapaxes(0, 1).reshape(rows, count * width, -1)[:, :length]
    return total, jax.tree.map(join, gradients)


def _gathered(kernel: Array, axis: int) -> Array:
    """`kernel` whole along an axis on every device, so that a loop does not gather it each time."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return kernel
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * kernel.ndim
    spec[axis] = None
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*spec))


def _batch_shards() -> int:
    """The number of devices that split the rows of a batch, by the current mesh; 1 without one."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)
