"""A checkpoint or a run, written for transformers, or merged with the base that the run tuned."""

import os
import sys
from pathlib import Path

from jax_instructblip import stores
from jax_instructblip.conversion.export import export_hf
from jax_instructblip.conversion.safetensors import SHARD_BYTES
from jax_instructblip.conversion.stored_model import tokenizers, write_checkpoint
from jax_instructblip.inference.loading import read_source, stored_model
from jax_instructblip.progress import count_bytes
from jax_instructblip.remote import is_remote
from jax_instructblip.training.step_choice import choose_step


def export(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    step: int | None = None,
    best: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path | str:
    """Exports a checkpoint folder or a tuned run to a folder that stock transformers loads.

    Prints what was written, and on stderr what the format cannot say of it.

    Args:
      path: a checkpoint folder of this package, a run, or an embedded name.
      out: the folder to make, or its address in a store; it must not exist, and appears when all
        is written.
      step: of a run: the checkpoint of this step; by default the newest.
      best: of a run: the checkpoint that validated best.
      shard_bytes: of the largest shard.

    Returns:
      The folder `out`, or its address.

    Raises:
      ValueError: the format cannot hold the model, or the run has no such step.
      OSError: `out` exists, there is nothing at `path`, or the disk has too little room.
    """
    with stores.output_folder(out) as (target, title):
        folder, chosen = choose_step(path, step=step, best=best)
        model = stored_model(read_source(folder))
        with count_bytes(model.nbytes, "exporting") as count:
            notes = export_hf(model, target, shard_bytes=shard_bytes, progress=count)
    print(f"{title}: {model.nbytes / 1e9:.2f} GB in Hugging Face's layout")
    if chosen:
        print(f"tuned: {chosen}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return title if is_remote(out) else target


def merge(
    run: str | os.PathLike,
    out: str | os.PathLike,
    *,
    step: int | None = None,
    best: bool = False,
) -> Path | str:
    """Merges a run with the base it tuned into one checkpoint folder that needs no other.

    Prints what was written, and on stderr what the checkpoint lacks.

    Args:
      run: a run directory, or one of its `checkpoints/STEP`.
      out: the folder to make, or its address in a store; it must not exist, and appears when all
        is written.
      step: the checkpoint of this step; by default the newest.
      best: the checkpoint that validated best.

    Returns:
      The folder `out`, or its address.

    Raises:
      ValueError: `run` is no run, or has no such step.
      OSError: `out` exists, there is nothing at `run`, or the disk has too little room.
    """
    with stores.output_folder(out) as (target, title):
        folder, chosen = choose_step(run, step=step, best=best)
        source = read_source(folder)
        if source.step is None:
            raise ValueError(
                f"{folder} is no run: there is nothing to merge (a Hugging Face folder is "
                "converted by `jax-instructblip convert`, a checkpoint folder is whole already)"
            )
        model = stored_model(source)
        with count_bytes(model.nbytes, "merging") as count:
            write_checkpoint(model, target, progress=count)
        absent = [name for name in tokenizers(model.variant) if not (target / name).is_dir()]
    print(f"{title}: {chosen or folder} over {source.folder}, {model.nbytes / 1e9:.2f} GB")
    for name in absent:
        print(f"warning: no {name} in {source.folder}: it cannot answer", file=sys.stderr)
    return title if is_remote(out) else target
