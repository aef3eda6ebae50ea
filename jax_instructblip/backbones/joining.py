"""Makes one checkpoint of parts of several models, one parameter at a time.

vision of A, Q-Former of B, language model of C --write_joined--> OUT
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_instructblip import checkpoint, remote, stores
from jax_instructblip.atomic import check_room
from jax_instructblip.conversion.engine import Plan, is_finite
from jax_instructblip.conversion.stored_model import write_sides
from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import Source, stored_model
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vlm import param_shapes
from jax_instructblip.progress import count_bytes

Leaves = Iterable[tuple[str, np.ndarray]]


class Part(NamedTuple):
    """Parameters that come from one place: a model, or a random initialisation.

    Attributes:
      origin: a folder, an address, or "random", which is printed and written into config.json.
      nbytes: the bytes of all of them together.
      leaves: (path, array) of each, the path as in `llm/...`; can be read only once.
    """

    origin: str
    nbytes: int
    leaves: Leaves


def part_of(source: Source, chosen: Callable[[str], bool], path: str | os.PathLike[str]) -> Part:
    """Returns the parameters of a model whose paths (`llm/...`) `chosen` accepts, read one by one.

    `path` is where `source` was read from. If it is an address in a store, it becomes the origin;
    else the folder does.
    """
    origin = remote.address_of(path) or str(source.step or source.folder)
    if isinstance(source.leaves, Plan):
        plan = source.leaves
        names = [name for name in plan.leaves if chosen(name)]
        nbytes = sum(plan.leaves[name].nbytes for name in names)
        return Part(origin, nbytes, ((name, plan.make(name)) for name in names))
    model = stored_model(source)
    manifest = {name: model.manifest[name] for name in sorted(model.manifest) if chosen(name)}
    return Part(origin, checkpoint.manifest_bytes(manifest), model.read(manifest))


def part_of_arrays(origin: str, leaves: Mapping[str, np.ndarray]) -> Part:
    """Returns parameters that are in memory; `leaves` maps path to array."""
    return Part(origin, sum(leaf.nbytes for leaf in leaves.values()), leaves.items())


def write_joined(
    out: str | os.PathLike[str],
    variant: Variant,
    parts: Mapping[str, Part],
    copy_tokenizers: Callable[[Path], object],
) -> Path | str:
    """Writes a checkpoint folder of all parts, and prints where each part came from.

    Args:
      out: the folder to make, or its address in a store; it must not exist, and appears when all
        is written.
      variant: the sizes of the whole model.
      parts: the parameters, by a name of the part that is printed with its origin.
      copy_tokenizers: puts the tokenizers into the checkpoint folder that it is called with.

    Returns:
      The folder `out`, or its address.

    Raises:
      ValueError: leaves are missing, left over or of other shapes, or a tokenizer is of another
        model.
      OSError: `out` exists, a tokenizer is missing, or the disk has too little room.
    """
    expected = checkpoint.flatten(param_shapes(variant))
    nbytes = sum(part.nbytes for part in parts.values())
    shapes: dict[str, tuple[int, ...]] = {}
    not_finite: list[str] = []

    def leaves() -> Iterator[tuple[str, np.ndarray]]:
        with count_bytes(nbytes, "writing") as count:
            for part in parts.values():
                for path, array in part.leaves:
                    shapes[path], size = array.shape, array.nbytes
                    if not is_finite(array):
                        not_finite.append(f"{path} of {part.origin}")
                    yield path, array
                    del array  # the next leaf is made while no name holds this one
                    count(size, path)

    def add(partial: Path) -> None:
        """Compares the leaves with the model, and adds config.json and tokenizers."""
        wanted = {path: tuple(leaf.shape) for path, leaf in expected.items()}
        wrong = [
            f"{path}: found {shapes.get(path, 'nothing')}, expected {wanted.get(path, 'nothing')}"
            for path in sorted(shapes.keys() | wanted.keys())
            if shapes.get(path) != wanted.get(path)
        ]
        if wrong:
            raise ValueError(
                "\n  ".join([f"these parts make no whole model ({len(wrong)}):", *wrong])
            )
        origins = {name: part.origin for name, part in parts.items()}
        write_sides(partial, variant, origins, {}, InputFormat())
        copy_tokenizers(partial)
        reader = CaptionTokenizer if variant.llm is None else TextProcessor
        reader.load(partial, variant)

    with stores.output_folder(out) as (folder, title):
        check_room(folder, nbytes)
        checkpoint.write_tree(folder, leaves(), extra=add)
    print(f"{title}: {nbytes / 1e9:.2f} GB")
    for name, part in parts.items():
        print(f"  {name}: {part.origin}")
    if not_finite:
        print(f"warning: NaN or infinity in {', '.join(not_finite)}", file=sys.stderr)
    return title if remote.is_remote(out) else folder
