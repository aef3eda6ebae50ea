"""Exports a checkpoint folder or a tuned run to a folder that stock transformers loads."""

import argparse
import sys
from pathlib import Path

import jax

from jax_instructblip.atomic import refuse_existing
from jax_instructblip.commands.flags import check_flags
from jax_instructblip.conversion.export import SHARD_BYTES, export_hf
from jax_instructblip.inference.loading import read_source, stored_model
from jax_instructblip.progress import count_bytes
from jax_instructblip.training.step_choice import add_flags, choose_step


def main(argv: list[str]) -> int:
    """Writes the folder; returns 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip export", description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint folder of this package, or a run")
    parser.add_argument("--format", choices=("hf",), default="hf", help="hf: Hugging Face")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--shard_bytes", type=int, default=SHARD_BYTES, help="largest shard")
    add_flags(parser)
    args = parser.parse_args(argv)
    check_flags(args)
    jax.config.update("jax_platforms", "cpu")  # it is all files: no accelerator is held meanwhile

    refuse_existing(args.out)
    folder, chosen = choose_step(args.folder, step=args.step, best=args.best)
    model = stored_model(read_source(folder))
    with count_bytes(model.nbytes, "exporting") as count:
        notes = export_hf(model, args.out, shard_bytes=args.shard_bytes, progress=count)
    print(f"{args.out}: {model.nbytes / 1e9:.2f} GB in Hugging Face's layout")
    if chosen:
        print(f"tuned: {chosen}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0
