"""Products with weights: `Dense`, with or without a bias, and the head of a language model.

The kernel of a `Dense` is an array, or quantised: a dict of whole numbers `q` and their `scale`
(`models/quantise.py`).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jax_instructblip.models.quantise import expand, has_row_product, packed_shape, row_product

VOCAB_MULTIPLE = 8  # tensor cores of GPUs multiply matrices of multiples of 8 narrow numbers
_ROWS = 8  # of the matrix that stands for a single row on GPUs
_SMALL = 10_000_000  # weights; XLA for GPUs takes products of one row apart below
_ALGORITHMS = {  # narrow factors and a float32 sum
    jnp.dtype(jnp.bfloat16): jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
    jnp.dtype(jnp.float16): jax.lax.DotAlgorithmPreset.F16_F16_F32,
}
PRODUCT = "product"  # checkpoint name of the results of a `Dense` with a bias, for remat policies


class Dense(nn.Module):
    """A linear layer: `x @ kernel + bias`, summed over the last `contracted` axes of `x`.

    Attributes:
      features: sizes of the output axes that replace the contracted ones.
      dtype: dtype of both factors, and of the result unless `wide`.
      use_bias: whether there is a bias.
      contracted: the number of axes of `x` that are summed over.
      wide: return the float32 accumulator instead of rounding it, for results that are added to a
        residual stream. Ignored without a bias (T5, LLaMA), where `remat` "dots" would then store
        twice the bytes.
      bias_dtype: dtype in which product and bias are added, unless `wide`. With float32 the result
        is rounded once. With `dtype` XLA can add the bias inside a GPU's product (rounded once,
        too) and join products of the same factor; where it does not, the product is rounded before
        the sum.
    """

    features: tuple[int, ...]
    dtype: Any
    use_bias: bool = True
    contracted: int = 1
    wide: bool = False
    bias_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        contracted = x.shape[x.ndim - self.contracted :]
        flat = (math.prod(contracted), math.prod(self.features))
        init = lambda key, shape: nn.initializers.lecun_normal()(key, flat).reshape(shape)
        shape, x = (*contracted, *self.features), x.astype(self.dtype)
        stored = self.get_variable("params", "kernel")
        if isinstance(stored, Mapping):
            return self._quantised(x, stored, shape)
        kernel = self.param("kernel", init, shape)
        if not self.use_bias:
            return _tensordot(x, kernel.astype(self.dtype), self.contracted, self.dtype)
        bias = self.param("bias", nn.initializers.zeros, self.features)
        dtype = jnp.dtype(jnp.float32 if self.wide else self.bias_dtype)
        product: Array = affine(x, kernel, bias, dtype)  # pyright: ignore (custom_vjp hides it)
        # Named, because remat policies cannot see inside a function with a custom gradient.
        return checkpoint_name(product if self.wide else product.astype(self.dtype), PRODUCT)

    def _quantised(self, x: Array, kernel: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """The product with a quantised kernel, in float32 until the bias is added."""
        q, scale = kernel["q"], kernel["scale"]
        if q.shape not in (shape, packed_shape(shape, self.contracted, "int4")):
            raise ValueError(f"a quantised kernel has the shape {q.shape}, expected {shape}")
        if "input_scale" in kernel:  # powers of two: nothing is rounded
            x = x * rank_of(kernel["input_scale"][:, 0].astype(x.dtype), x)
        product: Array = quantised_product(  # pyright: ignore (custom_vjp hides it)
            x, q, scale, shape, self.contracted
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            product = product + rank_of(bias.astype(jnp.float32), product)
        wide = self.wide and self.use_bias
        return checkpoint_name(product if wide else product.astype(self.dtype), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def quantised_product(
    x: Array, q: Array, scale: Array, shape: tuple[int, ...], contracted: int
) -> Array:
    """`x` times a quantised, frozen kernel, in float32; the factors have the dtype of `x`.

    `q` and `scale` are parts of the kernel (`models/quantise.py`), which had `shape` before it was
    quantised. The last `contracted` axes of `x` are summed over with the first of the kernel; the
    kernel's other axes take their place in the result.

    Where all weights of an output channel share one scale (int8), the product is scaled, not the
    weights. On GPUs a single row has a product of its own, `quantise.row_product`. In the gradient
    of `x` the factors have its dtype, too; `q` and `scale` get none.
    """

    def of_rows(x: Array, q: Array, scale: Array) -> Array:
        kernel, channels = _factors(q, scale, shape, contracted)
        total = _tensordot(x, kernel.astype(x.dtype), contracted, jnp.float32)
        return total * rank_of(channels, total)

    def of_one(x: Array, q: Array, scale: Array) -> Array:
        leading = x.shape[: x.ndim - contracted]
        return row_product(x, q, scale, shape, contracted).reshape(*leading, *shape[contracted:])

    if not (_is_row(x, contracted) and has_row_product(q, scale, shape, contracted)):
        return of_rows(x, q, scale)
    return jax.lax.platform_dependent(x, q, scale, cuda=of_one, default=of_rows)


def _quantised_forward(
    x: Array, q: Array, scale: Array, shape: tuple[int, ...], contracted: int
) -> tuple[Array, Any]:
    total: Any = quantised_product(x, q, scale, shape, contracted)
    return total, (q, scale, jnp.zeros(0, x.dtype))


def _quantised_backward(
    shape: tuple[int, ...], contracted: int, kept: Any, gradient: Array
) -> tuple[Array, None, None]:
    q, scale, like = kept
    kernel, channels = _factors(q, scale, shape, contracted)
    factor = (gradient * rank_of(channels, gradient)).astype(like.dtype)
    axes = tuple(range(contracted - len(shape), 0))
    product = functools.partial(jnp.tensordot, precision=precision_of(like.dtype))
    return product(factor, kernel.astype(like.dtype), (axes, axes)), None, None


quantised_product.defvjp(_quantised_forward, _quantised_backward)


def _factors(
    q: Array, scale: Array, shape: tuple[int, ...], contracted: int
) -> tuple[Array, Array]:
    """A quantised kernel as (weights, a factor for each output channel that they still need)."""
    if any(size > 1 for size in scale.shape[:contracted]) or q.dtype != jnp.int8:
        return expand(q, scale, shape, contracted), jnp.ones(shape[contracted:], jnp.float32)
    return q, scale.reshape(shape[contracted:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(x: Array, kernel: Array, bias: Array, dtype: Any) -> Array:
    """`x @ kernel + bias` in `dtype`, the kernel cast to the dtype of `x`; with its own gradient.

    `bias` has the kernel's last axes; the kernel's others are summed over with the last of `x`.

    In the gradient, too, the factors of each product have the dtype of `x`, while the kernel's
    gradient is summed in the kernel's dtype and the bias's in float32. JAX's own rule would use the
    float32 gradient as a factor and sum the bias's gradient in `dtype`. A frozen kernel gets no
    gradient, and `x` is then not kept for the backward pass.
    """
    total = _tensordot(x, kernel.astype(x.dtype), kernel.ndim - bias.ndim, dtype)
    return total + rank_of(bias.astype(dtype), total)


def _affine_forward(x: Any, kernel: Any, bias: Any, dtype: Any) -> tuple[Array, Any]:
    total: Any = affine(x.value, kernel.value, bias.value, dtype)
    kept = x.value if kernel.perturbed else None
    return total, (kept, kernel.value, bias.value, jnp.zeros(0, x.value.dtype))


def _affine_backward(dtype: Any, kept: Any, gradient: Array) -> tuple[Array, Array | None, Array]:
    del dtype
    x, kernel, bias, like = kept
    narrow = like.dtype  # the dtype of the factors
    product = functools.partial(jnp.tensordot, precision=precision_of(narrow))
    batch_axes, feature_axes = tuple(range(gradient.ndim - bias.ndim)), tuple(range(-bias.ndim, 0))
    factor = gradient.astype(narrow)
    of_x = product(factor, kernel.astype(narrow), (feature_axes, feature_axes))
    of_bias = gradient.sum(batch_axes, dtype=jnp.float32).astype(bias.dtype)
    if x is None:
        return of_x, None, of_bias
    of_kernel = product(x, factor, (batch_axes, batch_axes), preferred_element_type=kernel.dtype)
    return of_x, of_kernel, of_bias


affine.defvjp(_affine_forward, _affine_backward, symbolic_zeros=True)


def _tensordot(x: Array, kernel: Array, contracted: int, dtype: Any) -> Array:
    """`x` times a kernel of its dtype, summed over `contracted` axes; the result has `dtype`."""
    product = functools.partial(jnp.tensordot, axes=contracted, preferred_element_type=dtype)
    return multiply(product, x, kernel, contracted, dtype)


def multiply(
    product: Callable[..., Array], x: Array, kernel: Array, contracted: int, dtype: Any
) -> Array:
    """Returns the result of `product`, a function called as `product(x, kernel, precision=...)`.

    `product` sums over the last `contracted` axes of `x` and returns an array of `dtype`; nothing
    is cast here.

    XLA for GPUs treats a single row badly, so it gets a product of its own there. With a small
    kernel it writes every product of two numbers to memory before it sums them: the row becomes the
    first of `_ROWS`, the others zeros. For a float32 result it makes a float32 copy of the kernel,
    unless the algorithm is named, which XLA for CPUs does not know.
    """
    plain = functools.partial(product, precision=precision_of(x.dtype))
    algorithm = _ALGORITHMS.get(x.dtype)
    if not _is_row(x, contracted):
        return plain(x, kernel)
    if kernel.size < _SMALL:
        missing = [(0, _ROWS - 1)] + [(0, 0)] * (x.ndim - 1)
        alone = lambda x, kernel: plain(jnp.pad(x, missing), kernel)[:1]
    elif algorithm is not None and jnp.dtype(dtype) == jnp.float32:
        alone = functools.partial(product, precision=algorithm)
    else:
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cuda=alone, default=plain)


def _is_row(x: Array, contracted: int) -> bool:
    """True if the leading axes of `x`, before those that are summed over, all have size 1."""
    leading = x.shape[: x.ndim - contracted]
    return bool(leading) and math.prod(leading) == 1


def precision_of(dtype: Any) -> str | None:
    """The matmul precision for factors of a numpy dtype: "highest" for float32, None for narrower.

    `Network.apply` sets the same, but a product of the gradient may be traced after `apply`
    returned.
    """
    return "highest" if dtype.itemsize >= 4 else None


class Head(nn.Module):
    """The output head of a language model: float32 vocabulary logits, accumulated in float32.

    The kernel is `[D, V]`, or with `by_word` the kernel `[V', D]` of `kernel_by_word`.
    """

    vocab: int
    dtype: Any
    by_word: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        init = nn.initializers.lecun_normal()
        if not self.by_word:
            kernel = self.param("kernel", init, (x.shape[-1], self.vocab))
            return word_logits(x, kernel, "DV", self.dtype)
        kernel = self.param("kernel", init, (round_up_words(self.vocab), x.shape[-1]))
        return word_logits(x, kernel, "VD", self.dtype)[..., : self.vocab]


class WordFactors(NamedTuple):
    """The factors of vocabulary logits: `word_logits(x, kernel, axes, dtype)`."""

    x: Float[Array, "*B D"]
    kernel: Float[Array, "_ _"]
    axes: str  # of the kernel, "DV" or "VD"


def kernel_by_word(kernel: Float[Array, "D V"]) -> Float[Array, "_ D"]:
    """The kernel `[V', D]` of a head for decoding: a row for each word, and rows of zeros.

    On a CPU a product of few rows reads this layout faster. V' is a multiple of `VOCAB_MULTIPLE`,
    without which XLA for GPUs would pad a copy of the kernel for every token.
    """
    vocab = kernel.shape[1]
    return jnp.pad(kernel.T, ((0, round_up_words(vocab) - vocab), (0, 0)))


def round_up_words(vocab: int) -> int:
    """The rows of `kernel_by_word` for a vocabulary: the next multiple of `VOCAB_MULTIPLE`."""
    return -(-vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def word_logits(
    x: Float[Array, "*B D"], kernel: Float[Array, "_ _"], axes: str, dtype: Any
) -> Float[Array, "*B V"]:
    """Float32 vocabulary logits: `x` times a kernel of axes "DV" or "VD", both in `dtype`."""
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    product = functools.partial(
        jnp.einsum, f"...D,{axes}->...V", preferred_element_type=jnp.float32
    )
    return multiply(product, x, kernel, 1, jnp.float32)


def apart(x: Array, count: int) -> tuple[Array, ...]:
    """`count` arrays equal to `x` that XLA takes for different ones.

    XLA for GPUs joins small kernels that multiply the same array to a larger one. In a loop over
    new tokens it would copy them for each token.
    """
    return jax.lax.optimization_barrier((x,) * count)


def rank_of(leaf: Array, x: Array) -> Array:
    """`leaf` with axes of size 1 put before its own, so that it has as many axes as `x`."""
    return leaf.reshape((1,) * (x.ndim - leaf.ndim) + leaf.shape)
