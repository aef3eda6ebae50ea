"""The placement of leaves on devices: one table for weights, gradients and moments.

    attention   heads over `tensor`, model width over `fsdp`
    mlp         hidden width over `tensor`, model width over `fsdp`
    vocabulary  over `tensor` where it divides, else the model width over both
    the rest    whole on every device: norms, biases, positions, queries, the patch convolution

Over `tensor` a layer then sums twice over devices, behind attention and behind the mlp
(Megatron-LM, arXiv 1909.08053); over `fsdp` each weight is fetched when its layer is computed.
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

LAYERS = "layers"  # leaves below it have one axis more, of layers, which is never split
BOTH = ("fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Rule:
    """The placement of the axes of leaves whose path ends so.

    Attributes:
      path: a regular expression of whole words of the path, its last ones.
      spec: the mesh axes over which each axis of the leaf (of one layer) is split.
      otherwise: the same, where the sizes do not divide as `spec` asks.
    """

    path: str
    spec: P
    otherwise: P | None = None


# The first match counts.
RULES = (
    # The Q-Former has 12 heads, which 8 devices cannot share; its attention is a hundredth of the
    # work, so there it is only stored in parts.
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
    Rule(r"(cross_)?attention/(query|key|value)/kernel", P("fsdp", "tensor", None)),
    Rule(r"(cross_)?attention/out/kernel", P("tensor", None, "fsdp")),
    Rule(r"((query|text)_)?mlp/(gate|in)/kernel", P("fsdp", "tensor")),
    Rule(r"((query|text)_)?mlp/out/kernel", P("tensor", "fsdp")),
    Rule(r"((image|text)_)?projection/kernel", P("fsdp", "tensor")),
    Rule(r"caption/in/kernel", P("fsdp", "tensor")),
    Rule(r"match/kernel", P()),  # two columns
    # FlanT5 has 32128 = 2^7 x 251 words, Vicuna 32001 and BERT 30523, both odd.
    Rule(r"head/kernel", P("fsdp", "tensor"), otherwise=P(BOTH, None)),
    # Not over `fsdp`: that splits the samples whose rows are looked up, and XLA would look up those
    # of all samples on every device.
    Rule(r"(text_)?embed/embedding", P(None, "tensor")),
    Rule(r"position_embed/embedding", P()),
    Rule(r"patch_embed/kernel", P()),
    Rule(r"bias|scale|cls|pos_embed|queries|relative_bias|temp", P()),
    Rule(r"step|count", P()),  # of the state and of the optimizer
)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The tree of placements of `tree`, whose leaves have a `shape`: weights, moments, a state.

    Raises:
        ValueError: leaves that no rule names, or whose sizes the mesh does not divide; all of them.
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
    """The axes of a mesh of these sizes over which each axis of a leaf is split.

    Raises:
        ValueError: no rule names it, or its sizes do not divide.
    """
    return _decide(path, shape, sizes)[1]


def place(path: str, array: np.ndarray, mesh: Mesh | None, dtype: Any = None) -> jax.Array:
    """The leaf on its devices, each given its own part alone; cast to `dtype` before that.

    Without a mesh it is on the default device.
    """
    if dtype is not None:
        array = array.astype(dtype, copy=False)
    if mesh is None:
        return jax.device_put(array)
    sharding = NamedSharding(mesh, spec_of(path, array.shape, mesh.shape))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def constrain_layer(weights: Any) -> Any:
    """One layer's weights, held where the rules put them until they are used.

    A scan takes them out of the stack of all layers. Without the constraint the compiler may fetch
    the stack whole, ahead of the scan, and then every device holds the tower; with it gradients are
    split layer by layer, too. The identity outside a mesh of `Auto` axes, as `layers.constrain`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return weights

    def constrain(path: Any, leaf: jax.Array) -> jax.Array:
        spec = spec_of(path_of(path), leaf.shape, mesh.shape)
        return jax.lax.with_sharding_constraint(leaf, spec) if any(spec) else leaf

    return jax.tree_util.tree_map_with_path(constrain, weights)


def remarks(tree: Any, mesh: Mesh) -> list[str]:
    """A sentence for each rule whose second choice the mesh takes; none on most meshes."""
    paths_by_remark: dict[str, list[str]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_of(path)
        rule, spec, reason = _decide(name, leaf.shape, mesh.shape)
        if reason:
            text = f"{reason}; split as {tuple(spec)} instead ({rule.path})"
            paths_by_remark.setdefault(text, []).append(name)
    return [f"{text}: {names[0]}, {len(names)} leaves" for text, names in paths_by_remark.items()]


def path_of(path: tuple[Any, ...]) -> str:
    """`optimizer/0/mu/qformer/queries`: the names and positions of a path of `jax.tree_util`."""
    words = (
        getattr(key, name) for key in path for name in ("key", "name", "idx") if hasattr(key, name)
    )
    return "/".join(map(str, words))


def _decide(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[Rule, P, str]:
    """The rule of a leaf, its spec, and why that is the second choice ("" if it is the first)."""
    words = ", ".join(map(str, shape))
    rule = next((rule for rule in RULES if re.search(f"(^|/)({rule.path})$", path)), None)
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
        reason = _misfit(spec, shape, sizes)
        if not reason:
            return rule, spec, "; ".join(reasons)
        reasons.append(reason)
    raise ValueError(
        f"{path} [{words}]: {'; '.join(reasons)} (rule {rule.path!r}); choose sizes that divide"
    )


def _misfit(spec: P, shape: tuple[int, ...], sizes: Mapping[str, int]) -> str:
    """The reason why a leaf of that shape cannot be split so; "" where it can."""
    if len(spec) != len(shape):
        return f"has {len(shape)} axes, expected {len(spec)}"
    for number, (axes, size) in enumerate(zip(spec, shape, strict=True)):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(sizes[axis] for axis in axes)
        if size % parts:
            over = " x ".join(f"{axis}={sizes[axis]}" for axis in axes)
            return f"axis {number} of {size} does not divide by {over}"
    return ""
