"""A model on disk, ready to be written in another form: a checkpoint, or a base with tuned weights.

No weights are read before `StoredModel.read` is called, and then one leaf (parameter) at a time.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_instructblip import checkpoint
from jax_instructblip.atomic import check_room
from jax_instructblip.conversion.hf_config import TOKENIZER_FILES
from jax_instructblip.conversion.input_formats import usual_input_format
from jax_instructblip.data.input_format import KEY, InputFormat
from jax_instructblip.models.variants import Variant

TOKENIZERS = ("tokenizer", "qformer_tokenizer")  # folders of a checkpoint

Leaves = Iterator[tuple[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """The parts of a model that are needed to write it as a checkpoint or a Hugging Face folder.

    Attributes:
      title: its name in messages.
      variant: its sizes.
      facts: where its weights came from, `source` of config.json.
      folder: the folder that holds its tokenizers, each in a subfolder.
      manifest: shape and dtype of each leaf (parameter), by path.
      read: function of leaf paths that yields (path, array) in that order, and compares hashes.
      limits: the limits of tokens with which it was tuned (fields of `TextProcessor`).
      input_format: how prompts and images are put to it.
    """

    title: str
    variant: Variant
    facts: Mapping[str, Any]
    folder: Path
    manifest: Mapping[str, Mapping[str, Any]]
    read: Callable[[Iterable[str]], Leaves]
    limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    input_format: InputFormat = InputFormat()

    @property
    def nbytes(self) -> int:
        """Size of all leaves in bytes."""
        return checkpoint.manifest_bytes(self.manifest)


def read_stored_model(folder: Path) -> StoredModel:
    """Returns the model in a checkpoint folder; a CheckpointError if the folder is none."""
    config = checkpoint.read_config(folder)
    try:
        variant = Variant.from_dict(config.get("variant", {}))
        facts = config.get("source", {})
        if KEY in config:
            input_format = InputFormat.from_dict(config[KEY])
        else:
            input_format = usual_input_format(variant, folder / TOKENIZERS[0], facts)
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{folder}/config.json is damaged: {error}") from error
    return StoredModel(
        str(folder),
        variant,
        facts,
        folder,
        checkpoint.read_manifest(folder),
        lambda paths: checkpoint.read_leaves(folder, paths),
        config.get("text", {}),
        input_format,
    )


def tuned(base: StoredModel, trainable: Path, **changes: Any) -> StoredModel:
    """Returns `base` with the parameters of the checkpoint folder `trainable` in place of its own.

    Each top-level tree that `trainable` has (such as `qformer`) is replaced as a whole. `changes`
    are new values of other fields of `StoredModel`: title, variant, facts, limits, input_format.
    """
    changed = checkpoint.read_manifest(trainable)
    trees = {path.partition("/")[0] for path in changed}
    kept = {path: e for path, e in base.manifest.items() if path.partition("/")[0] not in trees}

    def read(paths: Iterable[str]) -> Leaves:
        for is_changed, group in itertools.groupby(paths, changed.__contains__):
            some = list(group)
            yield from checkpoint.read_leaves(trainable, some) if is_changed else base.read(some)

    return dataclasses.replace(base, manifest={**kept, **changed}, read=read, **changes)


def write_checkpoint(
    model: StoredModel, out: Path, *, progress: Callable[[int], Any] = lambda size: None
) -> None:
    """Writes the model as a checkpoint folder `out` that needs no other folder.

    Dtypes are kept, tokenizers are copied. `progress` is called with the size in bytes of each
    leaf. `out` must not exist, and appears when it is complete.
    """
    check_room(out, model.nbytes)

    def leaves() -> Leaves:
        for path, array in model.read(sorted(model.manifest)):
            size = array.nbytes
            yield path, array
            del array  # free it before the next one is made
            progress(size)

    def add(partial: Path) -> None:
        write_sides(partial, model.variant, model.facts, model.limits, model.input_format)
        copy_tokenizers(model.folder, partial, model.variant)

    checkpoint.write_tree(out, leaves(), extra=add)


def write_sides(
    folder: Path,
    variant: Variant,
    facts: Mapping[str, Any],
    limits: Mapping[str, int],
    input_format: InputFormat,
) -> None:
    """Writes the config.json of a checkpoint folder; the arguments are as in `StoredModel`."""
    document: dict[str, Any] = {"variant": variant.to_dict(), "source": facts}
    if limits:
        document["text"] = dict(limits)
    if input_format != InputFormat():
        document[KEY] = input_format.to_dict()
    checkpoint.write_config(folder, document)


def tokenizers(variant: Variant) -> tuple[str, ...]:
    """Returns the names of a variant's tokenizer folders, in a checkpoint.

    They are "tokenizer" of a language model and "qformer_tokenizer" of a Q-Former that reads text.
    In a Hugging Face folder the first of them is at the root.
    """
    reads = getattr(variant.bridge, "instruction_aware", False)
    return TOKENIZERS[0 if variant.llm is not None else 1 : 2 if reads else 1]


def copy_tokenizers(folder: Path, out: Path, variant: Variant) -> list[str]:
    """Copies all tokenizers to subfolders of `out`; returns the names of missing ones.

    In `folder` the tokenizers are in subfolders (a checkpoint of this package), or the first is at
    the root (a Hugging Face folder).
    """
    files = {name: sorted((folder / name).glob("*")) for name in tokenizers(variant)}
    first = tokenizers(variant)[0]
    if not (folder / first).is_dir():
        files[first] = [folder / name for name in TOKENIZER_FILES]
    absent = []
    for name, paths in files.items():
        paths = [path for path in paths if path.is_file()]
        if not paths:
            absent.append(name)
            continue
        (out / name).mkdir()
        for path in paths:
            shutil.copyfile(path, out / name / path.name)
    return absent
