"""Writes the features of many images to files, and resumes an interrupted export.

A first stage of BLIP-2 gives features of images and of captions, a model that answers the visual
vectors that its language model reads. IMAGES is a folder, searched with its subfolders, or a
JSON-lines file; its answers are taken as captions.

With the words of a training run in place of --checkpoint, --images and --out, the patch features of
all its images are written to config.data.features; the same words after `train` then read these:

  jax-instructblip features --config FILE --config.data.features=DIR --config.data.augment=False
"""

import argparse
from pathlib import Path

from jax_instructblip.commands.flags import add_checkpoint, add_dtype, check_flags
from jax_instructblip.commands.train import read_config
from jax_instructblip.inference.feature_forms import FORMATS, FORMS, SHARD
from jax_instructblip.inference.generation_config import BATCH_SIZE


def main(argv: list[str]) -> int:
    """Writes the shards and prints their folder; returns 0."""
    if any(word.partition("=")[0] == "--config" for word in argv):
        return _write_patches(argv)
    flags = _parser().parse_args(argv)
    check_flags(flags, stores=("checkpoint",))
    from jax_instructblip.inference.feature_files import write_features

    out = write_features(
        *(flags.checkpoint, flags.images, flags.out),
        form=flags.form,
        prompt=flags.prompt,
        dtype=flags.dtype,
        batch_size=flags.batch_size,
        shard_size=flags.shard_size,
        file_format=flags.format,
    )
    print(f"features: {out}")
    return 0


def _write_patches(argv: list[str]) -> int:
    """Writes the patch features of a training run; returns 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip features", allow_abbrev=False)
    _add_sizes(parser)
    flags, words = parser.parse_known_args(argv)
    check_flags(flags)
    config = read_config(words)
    from jax_instructblip.training.patch_features import write_features

    out = write_features(config, batch_size=flags.batch_size, shard_size=flags.shard_size)
    print(f"features: {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    add = parser.add_argument
    add("--images", required=True, type=Path, help="a folder of images, or a JSON-lines file")
    add("--out", required=True, type=Path, help="folder of the shards")
    add("--form", choices=FORMS, help="of a first stage (default: normalised)")
    add("--prompt", help="of a folder and a model that answers: the prompt for all images")
    add("--format", choices=FORMATS, default="npz", help="of the shards (default: %(default)s)")
    _add_sizes(parser)
    add_dtype(parser)
    return parser


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shard_size", type=int, default=SHARD, help="images per shard (default: %(default)s)")
    add("--batch_size", type=int, default=BATCH_SIZE, help="images at once (default: %(default)s)")
