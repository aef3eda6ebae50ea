"""Exports a checkpoint folder to a folder that stock transformers loads."""

import argparse
import sys
from pathlib import Path

import jax

from jax_instructblip import checkpoint
from jax_instructblip.convert.export import SHARD_BYTES, export_hf
from jax_instructblip.data.progress import Progress
from jax_instructblip.folders import refuse_existing


def main(argv: list[str]) -> int:
    """Writes the folder; returns 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip export", description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint folder of this package")
    parser.add_argument("--format", choices=("hf",), default="hf", help="hf: Hugging Face")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--shard_bytes", type=int, default=SHARD_BYTES, help="largest shard")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # it is all files: no accelerator is held meanwhile

    refuse_existing(args.out)
    total = checkpoint.manifest_bytes(checkpoint.read_manifest(args.folder))
    with Progress(round(total / 1e6), "exporting", "MB") as progress:
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done, before = done + size, done
            progress.update(round(done / 1e6) - round(before / 1e6))

        notes = export_hf(args.folder, args.out, shard_bytes=args.shard_bytes, progress=count)
    print(f"{args.out}: {total / 1e9:.2f} GB in Hugging Face's layout")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0
