"""Merges a run with the base it tuned into one checkpoint folder that needs no other."""

import argparse
import sys
from pathlib import Path

import jax

from jax_instructblip.atomic import refuse_existing
from jax_instructblip.commands.flags import check_flags
from jax_instructblip.conversion.stored_model import TOKENIZERS, write_checkpoint
from jax_instructblip.inference.loading import read_source, stored_model
from jax_instructblip.progress import count_bytes
from jax_instructblip.training.step_choice import add_flags, choose_step


def main(argv: list[str]) -> int:
    """Writes the checkpoint folder; returns 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip merge", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory, or one of its checkpoints/STEP")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    add_flags(parser)
    args = parser.parse_args(argv)
    check_flags(args)
    jax.config.update("jax_platforms", "cpu")  # it is all files: no accelerator is held meanwhile

    refuse_existing(args.out)
    folder, chosen = choose_step(args.run, step=args.step, best=args.best)
    source = read_source(folder)
    if source.step is None:
        raise ValueError(
            f"{folder} is no run: there is nothing to merge (a Hugging Face folder is converted "
            "by `jax-instructblip convert`, a checkpoint folder is whole already)"
        )
    model = stored_model(source)
    with count_bytes(model.nbytes, "merging") as count:
        write_checkpoint(model, args.out, progress=count)
    print(f"{args.out}: {chosen or folder} over {source.folder}, {model.nbytes / 1e9:.2f} GB")
    absent = [name for name in TOKENIZERS if not (args.out / name).is_dir()]
    for name in absent:
        print(f"warning: no {name} in {source.folder}: it cannot answer", file=sys.stderr)
    return 0
