"""Products with weights: projections with or without a bias, and the head of a language model."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

PRODUCT = "product"  # the name of what a `Dense` with a bias gives, for `remat`


class Dense(nn.Module):
    """`x @ kernel + bias`, a product of `dtype` over the last `contracted` axes of `x`.

    Attributes:
      features: axes of the result after those of `x` that stay.
      dtype: of the factors, and of the result.
      use_bias: whether there is a bias.
      contracted: how many axes of `x` are summed over.
      wide: the result is the float32 that the product was summed in, for a residual sum. It needs a
        bias: without (in T5 and LLaMA) `remat` "dots" would keep twice the bytes.
      bias_dtype: of the sum with a bias. In float32 a result is rounded once. In `dtype` XLA adds
        the bias inside of a GPU's product, which rounds once, too, and joins products of the same
        factor; where it does not, the product is rounded before.
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
        kernel = self.param("kernel", init, (*contracted, *self.features))
        x = x.astype(self.dtype)
        if not self.use_bias:
            return jnp.tensordot(x, kernel.astype(self.dtype), self.contracted)
        bias = self.param("bias", nn.initializers.zeros, self.features)
        dtype = jnp.dtype(jnp.float32 if self.wide else self.bias_dtype)
        product: Array = affine(x, kernel, bias, dtype)  # pyright: ignore (custom_vjp hides it)
        # Named, since no policy sees the product inside of a function with its own gradient.
        return checkpoint_name(product if self.wide else product.astype(self.dtype), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(x: Array, kernel: Array, bias: Array, dtype: Any) -> Array:
    """The product of `x` and a kernel of its dtype, plus a bias, in `dtype`.

    In its gradient, too, both factors of a product have the dtype of `x`, while what weights are
    given is summed in their own: JAX's rule would multiply a float32 gradient as it is, and sum a
    bias's in `dtype`. A frozen kernel is given none, and `x` is not kept for it.
    """
    product = functools.partial(jnp.tensordot, precision=_precision(x.dtype))
    contracted = kernel.ndim - bias.ndim
    total = product(x, kernel.astype(x.dtype), contracted, preferred_element_type=dtype)
    return total + rank_of(bias.astype(dtype), total)


def _affine_forward(x: Any, kernel: Any, bias: Any, dtype: Any) -> tuple[Array, Any]:
    total: Any = affine(x.value, kernel.value, bias.value, dtype)
    kept = x.value if kernel.perturbed else None
    return total, (kept, kernel.value, bias.value, jnp.zeros(0, x.value.dtype))


def _affine_backward(dtype: Any, kept: Any, gradient: Array) -> tuple[Array, Array | None, Array]:
    del dtype
    x, kernel, bias, like = kept
    narrow = like.dtype  # that of the factors
    product = functools.partial(jnp.tensordot, precision=_precision(narrow))
    batch_axes, feature_axes = tuple(range(gradient.ndim - bias.ndim)), tuple(range(-bias.ndim, 0))
    factor = gradient.astype(narrow)
    of_x = product(factor, kernel.astype(narrow), (feature_axes, feature_axes))
    of_bias = gradient.sum(batch_axes, dtype=jnp.float32).astype(bias.dtype)
    if x is None:
        return of_x, None, of_bias
    of_kernel = product(x, factor, (batch_axes, batch_axes), preferred_element_type=kernel.dtype)
    return of_x, of_kernel, of_bias


affine.defvjp(_affine_forward, _affine_backward, symbolic_zeros=True)


def _precision(dtype: Any) -> str | None:
    """The precision that `Network` asks for; products may be made after its `apply` returned."""
    return "highest" if dtype.itemsize >= 4 else None


class Head(nn.Module):
    """Vocabulary logits in float32: the product accumulates in float32 whatever `dtype` is.

    The kernel is `[D, V]`, or `[V, D]` with `by_word`, which few rows at a time are read faster
    through on a CPU.
    """

    vocab: int
    dtype: Any
    by_word: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        shape, axes = (x.shape[-1], self.vocab), "DV"
        if self.by_word:
            shape, axes = shape[::-1], "VD"
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return word_logits(x, kernel, axes, self.dtype)


def word_logits(
    x: Float[Array, "*B D"], kernel: Float[Array, "_ _"], axes: str, dtype: Any
) -> Float[Array, "*B V"]:
    """Vocabulary logits in float32 of a product of `dtype` with a kernel of axes "DV" or "VD"."""
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    return jnp.einsum(f"...D,{axes}->...V", x, kernel, preferred_element_type=jnp.float32)


def rank_of(leaf: Array, x: Array) -> Array:
    """`leaf` with axes of size 1 before its own, as many as `x` has."""
    return leaf.reshape((1,) * (x.ndim - leaf.ndim) + leaf.shape)
