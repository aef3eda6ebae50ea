"""Writes a checkpoint or run in another layout, or merges a run with its frozen base."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from jax_instructblip import stores
from jax_instructblip.conversion.export import export_hf
from jax_instructblip.conversion.layouts import LAYOUTS
from jax_instructblip.conversion.llava_export import export_original, export_projector
from jax_instructblip.conversion.safetensors import SHARD_BYTES
from jax_instructblip.conversion.stored_model import tokenizers, write_checkpoint
from jax_instructblip.fields import check, one_of
from jax_instructblip.inference.loading import read_source, stored_model
from jax_instructblip.progress import count_bytes
from jax_instructblip.remote import is_remote
from jax_instructblip.training.step_choice import choose_step

_WRITERS: dict[str, Callable[..., list[str]]] = dict(
    zip(LAYOUTS, (export_hf, export_original, export_projector), strict=True)
)


def export(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    step: int | None = None,
    best: bool = False,
    format: str = "hf",
    shard_bytes: int = SHARD_BYTES,
) -> Path | str:
    """Exports a checkpoint folder or a tuned run to Hugging Face's or original LLaVA's layout.

    Prints the size to stdout, and to stderr what the layout cannot express.

    Args:
      path: a checkpoint folder of this package, a run, or the name of an embedded checkpoint.
      out: the new folder, or its address in an object store (`gs://...`); it must not exist yet,
        and appears only when everything is written.
      step: for a run, the step to export; by default the newest.
      best: for a run, export the step with the best validation score.
      format: "hf" for a folder that stock transformers loads, "original" for one of original
        LLaVA, "projector" for its `mm_projector.bin` alone.
      shard_bytes: the largest size of one safetensors file.

    Returns:
      The folder `out`, or its address.

    Raises:
      ValueError: the format cannot express the model, or the run has no such step.
      OSError: `out` exists, there is nothing at `path`, or the disk has too little room.
    """
    check({"format": format}, {"format": one_of(*LAYOUTS)})
    with stores.output_folder(out) as (target, title):
        folder, chosen = choose_step(path, step=step, best=best)
        model = stored_model(read_source(folder))
        written = 0
        with count_bytes(model.nbytes, "exporting") as count:

            def counted(size: int) -> None:
                nonlocal written
                written += size
                count(size)

            notes = _WRITERS[format](model, target, shard_bytes=shard_bytes, progress=counted)
    print(f"{title}: {written / 1e9:.2f} GB in {LAYOUTS[format]}")
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
    """Merges a run with the frozen base it was trained on into one whole checkpoint folder.

    Prints the size to stdout, and to stderr a warning for each tokenizer that is missing.

    Args:
      run: a run directory, or one of its `checkpoints/STEP`.
      out: the new folder, or its address in an object store (`gs://...`); it must not exist yet,
        and appears only when everything is written.
      step: the step to merge; by default the newest.
      best: merge the step with the best validation score.

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
