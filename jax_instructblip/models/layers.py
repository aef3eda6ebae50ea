"""Parts that several towers share: norms, feed-forwards, dropout, precision, the scan over layers.

A tower is the vision encoder, the bridge or the language model.
"""

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

from jax_instructblip.models.dense import PRODUCT, Dense, apart, rank_of

# The dtype of residual streams, whatever dtype the layers compute in: in bfloat16 each sum would be
# rounded to 8 bits, which is farther from float64 than autocast in PyTorch
# (benchmarks/precision.py). Embeddings begin a stream in this dtype; sums and norms keep it.
RESIDUAL = jnp.float32
BATCH_AXES = ("data", "fsdp")  # mesh axes that split the batch
FLAGS = ("queries", "return_kv", "train")  # layer arguments that are static: Python values

# Remat policies: which results a backward pass keeps from the forward pass, by name.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(  # repeats scores, softmax, norms ...
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "full": None,  # repeats the whole layer, from its input
}

# Inputs must be float32: in bfloat16 1 + erf(x) has no digits left where x is below -2.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),  # erf, as PyTorch's default
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI CLIP's
}


@dataclasses.dataclass(frozen=True)
class Scan:
    """Settings for running the layers of one tower (vision encoder, bridge or language model).

    No setting changes a result, except for rounding.

    Attributes:
      remat: a key of `REMAT`. "none" keeps everything for the backward pass; "dots" keeps the
        products with weights and repeats little; "full" keeps only the input of each layer and
        computes the forward pass twice.
      weights: function applied to the weights of each layer when they are sliced from their stack
        (`parallel.rules.constrain_layer`); None for no function.
      unstacked: parameters and caches are one tree per layer (`unstack_layers`) instead of a stack,
        and the kernel of a head is that of `dense.kernel_by_word`. For decoding where a product
        with a slice of a stack copies the slice first. `remat` and `weights` are then ignored.
      fused: the kernel of `attention_kernels.py` that computes attention over whole rows where it
        can: "cudnn" or "splash"; "auto" for what the devices have (`Scans.on`), "" for none. A
        kernel holds no scores in memory, and rounds them otherwise than einsums do.
    """

    remat: str = "none"
    weights: Callable[[Any], Any] | None = None
    unstacked: bool = False
    fused: str = ""


@dataclasses.dataclass(frozen=True)
class Scans:
    """The `Scan` settings of each tower: vision encoder, bridge, language model."""

    vision: Scan = Scan()
    qformer: Scan = Scan()  # the bridge, if it has layers to scan
    llm: Scan = Scan()

    def on(self, kernel: str) -> "Scans":
        """A copy in which `kernel`, a result of `attention_kernels.kernel_for`, replaces "auto"."""
        towers = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        of = lambda scan: kernel if scan.fused == "auto" else scan.fused
        return Scans(
            **{name: dataclasses.replace(scan, fused=of(scan)) for name, scan in towers.items()}
        )


def constrain(x: Array) -> Array:
    """Splits the first axis of `x` over the batch axes of the current mesh, and no other axis.

    Every residual sum passes through this function, embeddings too. Otherwise XLA may split the
    width of a sum over the devices that share the heads and then give rows to the wrong devices
    (seen in jaxlib 0.10.2, with all three mesh axes above 1 and one or two rows per device).

    Returns `x` unchanged if its first axis has size 1, if no mesh is set, or if the mesh's axes are
    not `Auto` (inside pmap and shard_map), so that a layer also runs alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names) or x.shape[0] == 1:
        return x
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


class Network(nn.Module):
    """A Flax module whose float32 products are computed in full float32 on every machine.

    By default TPUs multiply float32 matrices in bfloat16, and newer GPUs in TF32. If the module's
    `dtype` is float32 (or it has none), all products of `apply` and of its gradient use the highest
    precision. For narrower dtypes the ambient `jax.default_matmul_precision` applies.
    """

    @nn.nowrap
    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `nn.Module.apply`, with full float32 products if `dtype` is float32."""
        dtype = jnp.dtype(getattr(self, "dtype", jnp.float32))
        if dtype.itemsize < 4:
            return super().apply(*args, **kwargs)
        with jax.default_matmul_precision("highest"):
            return super().apply(*args, **kwargs)


class Dropout(nn.Module):
    """Dropout as `nn.Dropout`, but with a barrier, so that the mask is computed before its use.

    Without the barrier XLA for TPUs fuses the random bits into the products around them and
    compares tilings until its time or stack runs out (libtpu 0.0.42, FlanT5-XL).
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        if self.rate == 0 or deterministic:
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)
        return jnp.where(jax.lax.optimization_barrier(kept), x / (1 - self.rate), 0)


class Embedding(nn.Module):
    """A table of `count` rows, looked up in its own dtype, then cast to that of residual streams.

    `nn.Embed` casts the whole table first, which XLA for TPUs would do again for each new token.
    """

    count: int
    features: int
    embedding_init: Callable[..., Array]

    def setup(self):
        self.embedding = self.param("embedding", self.embedding_init, (self.count, self.features))

    def __call__(self, index: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return jnp.take(self.embedding, index, axis=0).astype(RESIDUAL)


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
    """Root-mean-square norm with float32 statistics; casts to the dtype of `x`, then scales.

    T5 and LLaMA in PyTorch have this order of cast and scale.
    """

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        wide = x.astype(jnp.float32)
        variance = jnp.square(wide).mean(-1, keepdims=True)
        normal = (wide * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return normal * rank_of(scale.astype(x.dtype), x)


class Mlp(nn.Module):
    """The feed-forward `out(activation(in(x)))` with biases; the result is float32.

    `activation` is a key of `ACTIVATIONS`; `dtype` and `bias_dtype` are as in `dense.Dense`.
    """

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
    """The feed-forward `out(activation(gate(x)) * in(x))` without biases; dropout before `out`.

    `activation` is a key of `ACTIVATIONS`. `newest` is True for the newest tokens of an answer, or
    of a tree of answers (`dense.apart`).
    """

    width: int
    hidden: int
    dtype: Any
    activation: str
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B D"], train: bool = False, newest: bool = False
    ) -> Float[Array, "*B D"]:
        dense = functools.partial(Dense, dtype=self.dtype, use_bias=False)
        first, second = apart(x.astype(self.dtype), 2) if newest else (x, x)
        wide = dense((self.hidden,), name="gate")(first).astype(jnp.float32)
        gate = ACTIVATIONS[self.activation](wide)
        hidden = (gate * dense((self.hidden,), name="in")(second)).astype(self.dtype)
        hidden = Dropout(self.dropout)(hidden, deterministic=not train)
        return dense((self.width,), name="out")(hidden)


@jax.custom_vjp
def take_slots(
    x: Float[Array, "B S D"], index: Int[Array, "B T"], inverse: Int[Array, "B S"]
) -> Float[Array, "B T D"]:
    """Gathers along axis 1: `x[b, index[b, t]]`, zeros where an index is out of range.

    No index may occur twice in a row, and `inverse[b, s]` must be the t that takes slot s (T or
    more if none does), so that the gradient is a gather, too. The gradient of an ordinary gather is
    a scatter-add, which took a tenth of a training step.
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
    """The inverse of `index`: entry s is the t with `index[b, t] == s`, or T if there is none.

    S is `length`; indices outside of 0 to `length` - 1 are skipped.
    """
    rows, count = jnp.arange(index.shape[0])[:, None], index.shape[1]
    nowhere = jnp.full((index.shape[0], length), count, jnp.int32)
    own = jnp.arange(count, dtype=jnp.int32)[None]
    return nowhere.at[rows, jnp.where(index < 0, length, index)].set(own, mode="drop")


def scan_layers(
    block: type[nn.Module], length: int, scan: Scan, **broadcast: int
) -> Callable[..., Any]:
    """Returns a constructor of `length` scanned layers of type `block`, parameters stacked.

    The constructor takes the arguments of `block`. `broadcast` names the methods of `block` that
    are scanned (`call` stands for `__call__`) and the number of last arguments that every layer
    receives alike. Before those a method takes the carry and one tree with a leading axis of layers
    (or None); it returns the carry and one tree to stack (or None). With `scan.unstacked` these
    trees are tuples with one entry per layer.
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
        # Flags are those of `__call__`: only it has a backward pass. A scan's body needs no
        # protection from common-subexpression elimination (prevent_cse).
        policy = _policy(scan.remat)
        block = nn.remat(block, policy=policy, static_argnums=flags, prevent_cse=False)
    return nn.scan(block, methods=methods)


class LayerList(nn.Module):
    """Layers that run one after the other, each with its own parameters: `{"0": ..., "1": ...}`.

    Replaces `nn.scan` where parameters are not stacked: each method calls the layers' method of its
    name, and takes and returns what the scanned one does (`scan_layers`).
    """

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
    """Splits stacked parameters `[Y, ...]` into one tree per layer, `{"0": ..., "1": ...}`.

    `LayerList` takes the result. Leaves may also be tuples of layers instead of stacks.
    """
    is_leaf = lambda leaf: isinstance(leaf, tuple)
    count = len(jax.tree.leaves(stack, is_leaf=is_leaf)[0])
    pick = lambda index: jax.tree.map(lambda leaf: leaf[index], stack, is_leaf=is_leaf)
    return {str(index): pick(index) for index in range(count)}


def zip_layers(**trees: Any) -> Any:
    """Groups named trees by layer, in the form that scanned or unstacked layers take.

    Stacked trees become a dict of stacks; tuples of layers become one tuple with a dict per layer.
    """
    if all(isinstance(tree, tuple) for tree in trees.values()):
        return tuple(
            dict(zip(trees, each, strict=True)) for each in zip(*trees.values(), strict=True)
        )
    return trees


def _change(weights: Callable[[Any], Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Applies `weights` to the parameters of one layer, given as `{"params": tree}`."""
    return {name: weights(tree) for name, tree in variables.items()}


def _policy(remat: str) -> Callable[..., bool] | None:
    """The policy `REMAT[remat]`, except that results of sharding constraints are never saved.

    Saved, they would be a second copy of every layer's weights until the backward pass.
    """
    policy = REMAT[remat]
    if policy is None:
        return None
    return lambda primitive, *arguments, **options: (
        primitive.name != "sharding_constraint" and policy(primitive, *arguments, **options)
    )
