"""Assembles the tensors of a foreign format from our leaves: the conversion rules run backward.

Each tensor is put together from the parameters that its parts filled. A part that filled none (the
ViT's key bias) is written as zeros.
"""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_instructblip.conversion import transforms
from jax_instructblip.conversion.engine import Drop, Entry, Fixed, Rule, Zeros
from jax_instructblip.conversion.safetensors import Writer
from jax_instructblip.conversion.stored_model import StoredModel

DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("bfloat16", "float16", "float32")
}


@dataclasses.dataclass(frozen=True)
class Group:
    """The tensors of one source name, one for each layer, and the rules about their parts.

    Attributes:
      keys: the names of the tensors.
      entries: the rules about the parts of such a tensor, in the order of the parts.
      dtype: the dtype of each tensor.
      shape: the shape of each tensor, all parts together.
    """

    keys: list[str]
    entries: Sequence[Rule | Zeros | Fixed]
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def rules(self) -> list[Rule]:
        """The rules alone: each names a leaf."""
        return [entry for entry in self.entries if isinstance(entry, Rule)]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return len(self.keys) * math.prod(self.shape) * self.dtype.itemsize

    def make(self, layer: int, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the tensor `keys[layer]`, assembled from the leaves of its parts.

        `leaves` maps path to parameter, and has those of `rules`.
        """
        if isinstance(self.entries[0], Fixed):
            return self.entries[0].make(self.shape[0], self.dtype)
        tensor = np.zeros(self.shape, self.dtype)
        rows = self.shape[0] // len(self.entries) if self.shape else 0
        for part, entry in enumerate(self.entries):
            if isinstance(entry, Rule):
                leaf = leaves[entry.target]
                leaf = leaf if entry.layers is None else leaf[layer]
                target = (
                    tensor[part * rows : (part + 1) * rows] if len(self.entries) > 1 else tensor
                )
                transforms.copy(target, entry.transform.backward(leaf))
        return tensor


def make_groups(
    entries: Iterable[Entry],
    manifest: Mapping[str, Any],
    title: str,
    *,
    leave_out_head: bool = False,
) -> list[Group]:
    """Returns the groups of tensors that rules (`entries`) make of the leaves in a manifest.

    `manifest` is that of a checkpoint (`StoredModel.manifest`), `title` its name in the error.
    With `leave_out_head`, the language model's head is left out: the format ties it to the
    embedding.

    Raises:
      ValueError: the parts of a tensor have different dtypes.
    """
    by_source: dict[str, list[Rule | Zeros]] = defaultdict(list)
    groups = []
    for entry in entries:
        if isinstance(entry, Drop):
            continue
        if isinstance(entry, Fixed):
            leaf = manifest[entry.like]
            size, dtype = leaf["shape"][0], DTYPES[leaf["dtype"]]
            groups.append(Group(entry.keys, [entry], dtype, entry.make(size, dtype).shape))
            continue
        if leave_out_head and isinstance(entry, Rule) and entry.target == "llm/head/kernel":
            continue
        by_source[f"{entry.source} {entry.layers}"].append(entry)
    for parts in by_source.values():
        parts.sort(key=lambda entry: entry.part)
        rule = next(entry for entry in parts if isinstance(entry, Rule))
        leaf = manifest[rule.target]
        inner = tuple(leaf["shape"]) if rule.layers is None else tuple(leaf["shape"])[1:]
        first, *rest = rule.transform.source_shape(inner) or (1,)
        shape = (first * len(parts), *rest) if inner else ()
        dtypes = {manifest[e.target]["dtype"] for e in parts if isinstance(e, Rule)}
        if len(dtypes) > 1:
            raise ValueError(
                f"{rule.source} is made of leaves of different dtypes {sorted(dtypes)} in {title}: "
                "convert or merge it again"
            )
        groups.append(Group(rule.keys, parts, DTYPES[dtypes.pop()], shape))
    return groups


def assemble(model: StoredModel, groups: list[Group]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) in the order of the groups; memory holds the leaves of one group."""
    wanted = [rule.target for group in groups for rule in group.rules]
    leaves = model.read(wanted)
    for group in groups:
        group_leaves = dict(itertools.islice(leaves, len(group.rules)))
        for layer, key in enumerate(group.keys):
            yield key, group.make(layer, group_leaves)
        del group_leaves  # free them before the next group is read


def write_tensors(
    model: StoredModel,
    groups: list[Group],
    folder: Path,
    shard_bytes: int,
    progress: Callable[[int], Any] | None,
) -> None:
    """Writes the tensors of the groups to safetensors files in `folder`.

    A file has at most `shard_bytes`, or a single larger tensor. `progress` is called after each
    tensor, with its size in bytes.
    """
    specs = {key: (group.dtype, group.shape) for group in groups for key in group.keys}
    writer = Writer(folder, specs, shard_bytes)
    for key, tensor in assemble(model, groups):
        writer.write(key, tensor)
        if progress is not None:
            progress(tensor.nbytes)
    writer.close()
