"""Parts of several towers: norms, feed-forwards, precision, slots, the scan over layers."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from jax_instructblip.models.dense import PRODUCT, Dense, rank_of

# Of the residual streams, whatever the layers between them compute in: in bfloat16 each sum would
# be rounded to 8 bits, which is farther from float64 than autocast in PyTorch
# (benchmarks/precision.py). Embeddings begin a stream in this dtype; sums and norms keep it.
RESIDUAL = jnp.float32
BATCH_AXES = ("data", "fsdp")  # mesh axes that split the batch
FLAGS = ("queries", "return_kv", "train")  # arguments of a layer that are no arrays

# What a backward pass computes again instead of keeping it since the forward pass.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(  # scores, softmax, norms ...
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "full": None,  # the whole layer, from its input
}

# To be called with float32: in bfloat16 1 + erf(x) has no digits left where x is below -2.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),  # erf, as PyTorch's default
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI CLIP's
}


@dataclasses.dataclass(frozen=True)
class Scan:
    """The way in which the layers of a tower are run; no value depends on it.

    Attributes:
      remat: a name of `REMAT`. "full" keeps the input of each layer alone and computes the forward
        pass twice; "dots" keeps the products with weights, too, and repeats little.
      weights: what is done to the weights of each layer where they are taken out of their stack
        (`parallel.rules.constrain_layer`); None for nothing.
      unstacked: the parameters are one tree a layer (`unstack_layers`) instead of a stack, and so
        is what layers are given and return; the kernel of a head is `[V, D]`. For decoding on a
        CPU, where a product with a slice of a stack copies the slice first. Neither of the two
        fields above applies.
    """

    remat: str = "none"
    weights: Callable[[Any], Any] | None = None
    unstacked: bool = False


@dataclasses.dataclass(frozen=True)
class Scans:
    """The way in which the layers of each tower are run."""

    vision: Scan = Scan()
    qformer: Scan = Scan()  # of the bridge, where it has layers
    llm: Scan = Scan()


def constrain(x: Array) -> Array:
    """`x` with its first axis split over the batch axes of the ambient mesh, and no other axis.

    Every residual sum goes through it, embeddings too. Where XLA is left to choose, it may split
    the width of a sum over the devices that share the heads, and then hand rows to wrong devices
    (seen in jaxlib 0.10.2, with all three axes above 1 and one or two rows a device).

    The identity for a row that all samples share, and where no mesh is set or its axes are not
    `Auto` (inside pmap and shard_map), so that a layer runs alone as well.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names) or x.shape[0] == 1:
        return x
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


class Network(nn.Module):
    """A module that computes in its `dtype` (float32 where it has none), on every machine.

    TPUs multiply float32 matrices in bfloat16 and newer GPUs in TF32 unless each product asks for
    more. All products of `apply`, and those of its gradient, ask where the dtype is float32; the
    ambient `jax.default_matmul_precision` counts for narrower ones alone.
    """

    @nn.nowrap
    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the module as `nn.Module.apply` does, in the precision of its `dtype`."""
        dtype = jnp.dtype(getattr(self, "dtype", jnp.float32))
        if dtype.itemsize < 4:
            return super().apply(*args, **kwargs)
        with jax.default_matmul_precision("highest"):
            return super().apply(*args, **kwargs)


class Dropout(nn.Module):
    """Dropout as `nn.Dropout`, but the mask is made before it is used, not where.

    XLA for TPUs would compute the random bits inside of the products around them, and compare the
    tilings of those until its time or stack runs out (libtpu 0.0.42, FlanT5-XL).
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        if self.rate == 0 or deterministic:
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)
        return jnp.where(jax.lax.optimization_barrier(kept), x / (1 - self.rate), 0)


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
        scale, bias = (rank_of(leaf.astype(jnp.float32), x) for leaf in (scale, bias))
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
        return normal * rank_of(scale.astype(x.dtype), x)


class Mlp(nn.Module):
    """`out(activation(in(x)))`, with biases; float32."""

    width: int
    hidden: int
    dtype: Any
    activation: str = "gelu"
    bias_dtype: Any = jnp.float32

    def setup(self):
        # `in` is a Python keyword, so the submodule is named in words.
        self.up = Dense((self.hidden,), self.dtype, bias_dtype=self.bias_dtype, name="in")
        self.out = Dense((self.width,), self.dtype, wide=True)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.out(ACTIVATIONS[self.activation](self.up(x).astype(jnp.float32)))


class GatedMlp(nn.Module):
    """`out(activation(gate(x)) * in(x))`, no biases; dropout on the product (T5 only)."""

    width: int
    hidden: int
    dtype: Any
    activation: str
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], train: bool = False) -> Float[Array, "*B D"]:
        dense = functools.partial(Dense, dtype=self.dtype, use_bias=False)
        wide = dense((self.hidden,), name="gate")(x).astype(jnp.float32)
        gate = ACTIVATIONS[self.activation](wide)
        hidden = (gate * dense((self.hidden,), name="in")(x)).astype(self.dtype)
        hidden = Dropout(self.dropout)(hidden, deterministic=not train)
        return dense((self.width,), name="out")(hidden)


@jax.custom_vjp
def take_slots(
    x: Float[Array, "B S D"], index: Int[Array, "B T"], inverse: Int[Array, "B S"]
) -> Float[Array, "B T D"]:
    """`x[b, index[b, t]]`, zeros where an index is out of range.

    No slot is taken twice, and `inverse` says where each of the S is taken (T or more where
    nowhere), so the gradient is a gather, too. The gradient of an ordinary gather is a scatter-add,
    which took a tenth of a training step.
    """
    del inverse
    picked = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1)[..., None], axis=1)
    inside = (index >= 0) & (index < x.shape[1])
    return jnp.where(inside[..., None], picked, 0)


def _take_forward(x: Array, index: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return take_slots(x, index, inverse), (index, inverse)


def _take_backward(indices: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    index, inverse = indices
    return take_slots(gradient, inverse, index), None, None


take_slots.defvjp(_take_forward, _take_backward)


def unique_inverse(index: Int[Array, "B T"], length: int) -> Int[Array, "B S"]:
    """The position in `index` of each of 0 ... `length` - 1; T for those that it has not."""
    rows, count = jnp.arange(index.shape[0])[:, None], index.shape[1]
    nowhere = jnp.full((index.shape[0], length), count, jnp.int32)
    own = jnp.arange(count, dtype=jnp.int32)[None]
    return nowhere.at[rows, jnp.where(index < 0, length, index)].set(own, mode="drop")


def scan_layers(
    block: type[nn.Module], length: int, scan: Scan, **broadcast: int
) -> Callable[..., Any]:
    """`block` repeated `length` times by `nn.scan`, its parameters stacked on axis 0.

    `broadcast` names the methods that are scanned (`call` is `__call__`) and how many arguments of
    each every layer sees alike. Before those a method takes the carry and one tree with a leading
    axis of layers (or None); it returns the carry and one tree to stack (or None). With
    `scan.unstacked` that tree is a tuple of the layers' own ones.
    """
    if scan.unstacked:
        return lambda *args: LayerList(functools.partial(block, *args), length)

    def lift(count: int) -> dict[str, Any]:
        return {
            "variable_axes": {"params": 0},
            "split_rngs": {"params": True, "dropout": True},
            "in_axes": (0,) + (nn.broadcast,) * count,
            "length": length,
        }

    methods = {"__call__" if name == "call" else name: lift(n) for name, n in broadcast.items()}
    names = inspect.signature(block.__call__).parameters
    flags = tuple(index for index, name in enumerate(names) if name in FLAGS)
    if scan.weights is not None:
        change = functools.partial(_change, scan.weights)
        block = nn.map_variables(
            block, "params", trans_in_fn=change, init=True, methods=list(methods)
        )
    if scan.remat != "none" or scan.weights is not None:
        # Only `__call__` has a backward pass. Inside a scan nothing need be kept from merging.
        policy = _policy(scan.remat)
        block = nn.remat(block, policy=policy, static_argnums=flags, prevent_cse=False)
    return nn.scan(block, methods=methods)


class LayerList(nn.Module):
    """Layers one after the other, each with parameters of its own: `{"0": ..., "1": ...}`."""

    make: Callable[..., nn.Module]
    length: int

    def setup(self):
        self.layers = [self.make(name=str(index)) for index in range(self.length)]

    def _each(self, method: str, carry: Any, own: Any, *shared: Any) -> tuple[Any, Any]:
        outputs = []
        for index, layer in enumerate(self.layers):
            own_input = None if own is None else own[index]
            carry, out = getattr(layer, method)(carry, own_input, *shared)
            outputs.append(out)
        return carry, None if all(out is None for out in outputs) else tuple(outputs)

    def __call__(self, *arguments: Any) -> tuple[Any, Any]:
        return self._each("__call__", *arguments)

    def step(self, *arguments: Any) -> tuple[Any, Any]:
        return self._each("step", *arguments)

    def tree(self, *arguments: Any) -> tuple[Any, Any]:
        return self._each("tree", *arguments)

    def cross_kv(self, *arguments: Any) -> tuple[Any, Any]:
        return self._each("cross_kv", *arguments)


def unstack_layers(stack: Any) -> dict[str, Any]:
    """Parameters `[Y, ...]` as `LayerList` takes them; leaves may be tuples of layers already."""
    is_leaf = lambda leaf: isinstance(leaf, tuple)
    count = len(jax.tree.leaves(stack, is_leaf=is_leaf)[0])
    pick = lambda index: jax.tree.map(lambda leaf: leaf[index], stack, is_leaf=is_leaf)
    return {str(index): pick(index) for index in range(count)}


def zip_layers(**trees: Any) -> Any:
    """Zips trees per layer: a dict of stacks stays one, tuples of layers become one of dicts."""
    if all(isinstance(tree, tuple) for tree in trees.values()):
        return tuple(
            dict(zip(trees, each, strict=True)) for each in zip(*trees.values(), strict=True)
        )
    return trees


def _change(weights: Callable[[Any], Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of one layer, `{"params": tree}`, after `weights`."""
    return {name: weights(tree) for name, tree in variables.items()}


def _policy(remat: str) -> Callable[..., bool] | None:
    """The policy of `REMAT`, which never keeps what a constraint returns: the same array again.

    Kept, the weights of every layer would be stored a second time until the backward pass.
    """
    policy = REMAT[remat]
    if policy is None:
        return None
    return lambda primitive, *arguments, **options: (
        primitive.name != "sharding_constraint" and policy(primitive, *arguments, **options)
    )
