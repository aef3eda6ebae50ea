"""The table of sharding rules for parameters, gradients and optimizer moments.

    attention   heads over `tensor`, model width over `fsdp`
    mlp         hidden width over `tensor`, model width over `fsdp`
    head        vocabulary over `tensor`, model width over `fsdp`; where the vocabulary does not
                divide, model width over both
    embedding   model width over `tensor`; moments of a trained one also vocabulary over `fsdp`
    the rest    whole on every device: norms, biases, positions, queries, the patch convolution

A quantised kernel (`models/quantise.py`) is split like the kernel that it stands for.

With `tensor` above 1 a layer has two all-reduces, after the attention and after the mlp
(Megatron-LM, arXiv 1909.08053). With `fsdp` above 1 each weight is gathered when its layer runs.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

LAYERS = "layers"  # leaves below this key have a first axis of layers, which is never split
BOTH = ("fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Rule:
    """The split of leaves over mesh axes, for all leaves whose path ends with a match of `path`.

    Attributes:
      path: a regular expression for the last words of a leaf's path.
      spec: the mesh axes over which each axis of the leaf is split, without the axis of layers.
      otherwise: the fallback, used if `spec` does not divide the sizes; None for no fallback.
    """

    path: str
    spec: P
    otherwise: P | None = None


# The first rule that matches a path applies.
RULES = (
    # The Q-Former has 12 heads, which 8 devices cannot share; its attention is a hundredth of the
    # work, so its kernels are then split by width: stored in parts, gathered for the product.
    Rule(
        r"(cross|plain)/(cross_)?attention/(query|key|value)/kernel",
        P("fsdp", "tensor", None),
        otherwise=P(BOTH, None, None),
    ),
    Rule(
        r"(cross|plain)/(cross_)?attention/out/kernel",
        P("tensor", None, "fsdp"),
        otherwise=P(None, None, BOTH),
    ),
    Rule(r"(cross_)?attention/query/kernel", P("fsdp", "tensor", None)),
    # A language model may have fewer key and value heads than `tensor` has devices.
    Rule(
        r"(cross_)?attention/(key|value)/kernel",
        P("fsdp", "tensor", None),
        otherwise=P(BOTH, None, None),
    ),
    Rule(r"(cross_)?attention/out/kernel", P("tensor", None, "fsdp")),
    Rule(r"((query|text)_)?mlp/(gate|in)/kernel", P("fsdp", "tensor")),
    Rule(r"((query|text)_)?mlp/out/kernel", P("tensor", "fsdp")),
    Rule(r"((image|text)_)?projection/kernel", P("fsdp", "tensor")),
    Rule(r"projector/in/kernel", P("fsdp", "tensor")),
    Rule(r"projector/out/kernel", P("tensor", "fsdp")),
    Rule(r"caption/in/kernel", P("fsdp", "tensor")),
    Rule(r"match/kernel", P()),  # two columns
    # FlanT5 has 32128 = 2^7 x 251 words, Vicuna 32001 and BERT 30523, both odd.
    Rule(r"head/kernel", P("fsdp", "tensor"), otherwise=P(BOTH, None)),
    # The moments of a trained token embedding are not looked up.
    Rule(r"(mu|nu)/llm/embed/embedding", P("fsdp", "tensor"), otherwise=P(None, "tensor")),
    # Not over `fsdp`, which also splits the batch: XLA would look up the ids of all samples on
    # every device.
    Rule(r"(text_)?embed/embedding", P(None, "tensor")),
    Rule(r"position_embed/embedding", P()),
    Rule(r"patch_embed/kernel", P()),
    Rule(r"bias|scale|cls|pos_embed|queries|relative_bias|temp", P()),
    Rule(r"step|count", P()),  # counters of the state and of the optimizer
)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for each leaf of `tree`: weights, moments, a state, or their shapes.

    The result has the structure of `tree`.

    Raises:
        ValueError: names all leaves that match no rule, or whose sizes the mesh does not divide.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    specs, wrong = [], []
    for path, leaf in flat:
        try:
            specs.append(spec_of(path_of(path), leaf.shape, mesh.shape))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(
            "\n  ".join([f"{len(wrong)} leaves cannot be laid over the mesh:", *wrong])
        )
    return jax.tree_util.tree_unflatten(treedef, [NamedSharding(mesh, spec) for spec in specs])


def spec_of(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """The `PartitionSpec` of the leaf at `path`, for a mesh whose axes have the sizes `sizes`.

    Raises:
        ValueError: no rule matches the path, or the sizes do not divide.
    """
    return _decide(path, shape, sizes)[1]


def place(path: str, array: np.ndarray, mesh: Mesh | None, dtype: Any = None) -> jax.Array:
    """Puts a leaf on its devices, each of which receives only its own part; casts to `dtype` first.

    `path` selects the sharding rule. If `mesh` is None the leaf goes to the default device; if
    `dtype` is None it keeps its own.
    """
    if dtype is not None:
        array = array.astype(dtype, copy=False)
    if mesh is None:
        return jax.device_put(array)
    sharding = NamedSharding(mesh, spec_of(path, array.shape, mesh.shape))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def constrain_layer(weights: Any) -> Any:
    """Keeps one layer's weights sharded by the rules until they are used.

    A scan slices these weights from the stack of all layers. Without the constraint the compiler
    may gather the whole stack before the scan, and every device then holds all layers. With the
    constraint gradients are split layer by layer, too. Returns `weights` unchanged if no mesh with
    `Auto` axes is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return weights

    def constrain(path: Any, leaf: jax.Array) -> jax.Array:
        spec = spec_of(path_of(path), leaf.shape, mesh.shape)
        return jax.lax.with_sharding_constraint(leaf, spec) if any(spec) else leaf

    return jax.tree_util.tree_map_with_path(constrain, weights)


def remarks(tree: Any, mesh: Mesh) -> list[str]:
    """A sentence for each rule whose fallback (`Rule.otherwise`) this mesh needs, with the reason.

    `tree` has weights or their shapes. Most meshes need no fallback.
    """
    paths_by_remark: dict[str, list[str]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_of(path)
        rule, spec, reason = _decide(name, leaf.shape, mesh.shape)
        if reason:
            text = f"{reason}; split as {tuple(spec)} instead ({rule.path})"
            paths_by_remark.setdefault(text, []).append(name)
    return [f"{text}: {names[0]}, {len(names)} leaves" for text, names in paths_by_remark.items()]


def path_of(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as text, such as `optimizer/0/mu/qformer/queries`."""
    words = (
        getattr(key, name) for key in path for name in ("key", "name", "idx") if hasattr(key, name)
    )
    return "/".join(map(str, words))


def _decide(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[Rule, P, str]:
    """A leaf's rule, its `PartitionSpec`, and why that is the rule's fallback ("" if it is not).

    Raises a ValueError if no rule matches, or no spec divides the shape.
    """
    words = ", ".join(map(str, shape))
    kernel, part = _kernel_of(path)
    rule = next((rule for rule in RULES if re.search(f"(^|/)({rule.path})$", kernel)), None)
    if rule is None:
        raise ValueError(
            f"{path} [{words}]: no rule says how it is split; add one to parallel/rules.py"
        )
    stacked = LAYERS in path.split("/")
    reasons: list[str] = []
    for spec in (rule.spec,) if rule.otherwise is None else (rule.spec, rule.otherwise):
        if not spec:
            return rule, spec, ""
        spec = P(None, *spec) if stacked else spec
        if part.endswith("scale"):
            divides = lambda axes, size: size % _parts(axes, sizes) == 0
            pairs = zip(spec, shape, strict=True)
            spec = P(*(axes if divides(axes, size) else None for axes, size in pairs))
        reason = _misfit(spec, shape, sizes)
        if not reason:
            return rule, spec, "; ".join(reasons)
        reasons.append(reason)
    raise ValueError(
        f"{path} [{words}]: {'; '.join(reasons)} (rule {rule.path!r}); choose sizes that divide"
    )


def _kernel_of(path: str) -> tuple[str, str]:
    """The path of the kernel that a leaf belongs to, and which part of it if it is quantised.

    `q` is split like the kernel that it stands for; scales as well, but along an axis that does not
    divide they are whole on every device.
    """
    kernel, _, part = path.rpartition("/")
    quantised = part in ("q", "scale", "input_scale") and kernel.rpartition("/")[2] == "kernel"
    return (kernel, part) if quantised else (path, "")


def _misfit(spec: P, shape: tuple[int, ...], sizes: Mapping[str, int]) -> str:
    """The reason why `spec` cannot split a leaf of `shape` on axes of `sizes`; "" if it can."""
    if len(spec) != len(shape):
        return f"has {len(shape)} axes, expected {len(spec)}"
    for number, (axes, size) in enumerate(zip(spec, shape, strict=True)):
        parts = _parts(axes, sizes)
        if size % parts:
            axes = (axes,) if isinstance(axes, str) else axes or ()
            over = " x ".join(f"{axis}={sizes[axis]}" for axis in axes)
            return f"axis {number} of {size} does not divide by {over}"
    return ""


def _parts(axes: Any, sizes: Mapping[str, int]) -> int:
    """The number of parts into which mesh axes of `sizes` split an axis; `axes` is as in a spec."""
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(sizes[axis] for axis in axes)
