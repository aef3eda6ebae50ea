"""What several towers share: norms, feed-forwards, the head, the scan over layers, `constrain`."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

BATCH_AXES = ("data", "fsdp")  # mesh axes that split the batch

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),  # erf, as PyTorch's default
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}


def constrain(x: Array) -> Array:
    """`x` with its first axis split over the batch axes of the ambient mesh.

    The identity where no mesh is set, or where its axes are not `Auto` (inside pmap and shard_map),
    so that a layer runs alone as well.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return x
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


class LayerNorm(nn.Module):
    """Layer norm with float32 statistics in two passes; the result has the dtype of `x`."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        width = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + self.eps)
        scale, bias = (_rank_of(leaf.astype(jnp.float32), x) for leaf in (scale, bias))
        return (normal * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm: float32 statistics, cast back *before* the scale (as T5 and LLaMA)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        wide = x.astype(jnp.float32)
        variance = jnp.square(wide).mean(-1, keepdims=True)
        normal = (wide * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return normal * _rank_of(scale.astype(x.dtype), x)


class Mlp(nn.Module):
    """`out(activation(in(x)))`, with biases."""

    width: int
    hidden: int
    dtype: Any
    activation: str = "gelu"

    def setup(self):
        # `in` is a Python keyword, so the submodule is named in words.
        self.rise = nn.Dense(self.hidden, dtype=self.dtype, name="in")
        self.out = nn.Dense(self.width, dtype=self.dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.out(ACTIVATIONS[self.activation](self.rise(x)))


class GatedMlp(nn.Module):
    """`out(activation(gate(x)) * in(x))`, no biases; dropout on the product (T5 only)."""

    width: int
    hidden: int
    dtype: Any
    activation: str
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], train: bool = False) -> Float[Array, "*B D"]:
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        gate = ACTIVATIONS[self.activation](dense(self.hidden, name="gate")(x))
        hidden = gate * dense(self.hidden, name="in")(x)
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
        return dense(self.width, name="out")(hidden)


class Head(nn.Module):
    """Vocabulary logits in float32: the product accumulates in float32 whatever `dtype` is."""

    vocab: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.vocab))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return jnp.einsum("...D,DV->...V", x, kernel, preferred_element_type=jnp.float32)


def scan_layers(block: type[nn.Module], length: int, **broadcast: int) -> Callable[..., Any]:
    """`block` repeated `length` times by `nn.scan`, its parameters stacked on axis 0.

    `broadcast` names the methods that are scanned (`call` is `__call__`) and how many arguments of
    each every layer sees alike. Before those a method takes the carry and one tree with a leading
    axis of layers (or None); it returns the carry and one tree to stack (or None).
    """

    def lift(count: int) -> dict[str, Any]:
        return {
            "variable_axes": {"params": 0},
            "split_rngs": {"params": True, "dropout": True},
            "in_axes": (0,) + (nn.broadcast,) * count,
            "length": length,
        }

    methods = {"__call__" if name == "call" else name: lift(n) for name, n in broadcast.items()}
    return nn.scan(block, methods=methods)


def _rank_of(leaf: Array, x: Array) -> Array:
    return leaf.reshape((1,) * (x.ndim - leaf.ndim) + leaf.shape)
