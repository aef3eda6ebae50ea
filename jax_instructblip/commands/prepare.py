"""Converts the original files of a dataset to the shards that training and evaluation read.

prepare DATASET --raw DIR --out OUT    reads the original files in DIR, writes OUT/DATASET/VERSION
prepare --list                         every dataset: family, splits, files, counts, licence, source
prepare DATASET --raw DIR --preview --out PAGE.html    20 samples as pictures, and text lengths
prepare scienceqa_qcm --raw DIR --conversations --out FILE.json    a file in LLaVA's layout
"""

import argparse
import os
import pathlib
from typing import Any

from jax_instructblip.commands.flags import check_flags
from jax_instructblip.data import datasets
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.remote import address_of


def main(argv: list[str]) -> int:
    """Prepares one dataset and prints a summary; returns 0."""
    parser = _parser()
    flags, options = parser.parse_known_args(argv)
    check_flags(flags, stores=("out", "checkpoint"))
    if options and not flags.beam_runner:
        parser.error(f"unknown flags: {' '.join(options)}")
    if flags.list:
        print(datasets.table(flags.dataset))
        return 0
    missing = [f"--{name}" for name in ("raw", "out") if getattr(flags, name) is None]
    if flags.dataset is None or missing:
        parser.error(f"expected {' and '.join(['DATASET'] * (flags.dataset is None) + missing)}")
    dataset = datasets.get_dataset(flags.dataset)
    splits = flags.split.split(",") if flags.split else []
    if address_of(flags.out) and (flags.preview or flags.conversations or flags.beam_runner):
        raise ValueError(
            f"--out is {address_of(flags.out)}, but --preview, --conversations and --beam_runner "
            "write to a local disk: give a local path"
        )
    if flags.conversations:
        from jax_instructblip.data.prepare.conversations import write_conversations

        print(write_conversations(dataset, flags.raw, flags.out, splits, flags.max_missing))
        return 0
    if flags.preview:
        from jax_instructblip.evaluation.reports.samples import preview
        from jax_instructblip.inference.text_loading import load_text

        preview(flags.out, dataset, flags.raw, load_text(flags.checkpoint), splits)
        print(f"written: {flags.out}")
        return 0
    from jax_instructblip.data.prepare.description import describe

    folder, title = _prepare(dataset, splits, flags, options)
    for line in describe(folder, dataset, flags.raw, title):
        print(line)
    return 0


def _prepare(
    dataset: Dataset, splits: list[str], flags: argparse.Namespace, options: list[str]
) -> tuple[pathlib.Path, str]:
    """Prepares the dataset; returns a local folder with its report, and its store address.

    The address is that of the dataset in an object store, "" if it is on the local disk.
    """
    common: dict[str, Any] = dict(splits=splits, max_missing=flags.max_missing, frames=flags.frames)
    if flags.beam_runner:
        from jax_instructblip.data.prepare.beam import prepare_with_beam

        common |= {"runner": flags.beam_runner, "options": options}
        return prepare_with_beam(dataset, flags.raw, flags.out, **common), ""
    from jax_instructblip.data.prepare.shards import prepare

    common |= {"workers": flags.workers, "shard_size": flags.shard_size}
    if address := address_of(flags.out):
        from jax_instructblip.data.prepare.to_store import prepare_to_store

        return prepare_to_store(dataset, flags.raw, address, **common)
    return prepare(dataset, flags.raw, flags.out, **common), ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", nargs="?", help="a name that --list prints")
    parser.add_argument(
        "--list", action="store_true", help="print the table, or of DATASET alone, and end"
    )
    parser.add_argument("--preview", action="store_true", help="write a page, prepare nothing")
    parser.add_argument(
        "--conversations",
        action="store_true",
        help="write one split (default: train) as a JSON list in LLaVA's layout, to FILE.json",
    )
    parser.add_argument("--raw", type=pathlib.Path, help="folder of its original files and images")
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder of prepared datasets, or its address in a store"
    )
    parser.add_argument("--split", help="with commas (default: all whose files are there)")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that write shards (default: %(default)s; 0: none besides this one)",
    )
    parser.add_argument("--shard_size", type=int, default=1000, help="records (default: 1000)")
    parser.add_argument("--frames", type=int, default=4, help="of each video (default: 4)")
    parser.add_argument(
        "--max_missing",
        type=float,
        default=0.01,
        help="part of the records that may have no usable image or text (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint",
        default="shapes_t5",
        help="whose tokenizers --preview shows: a folder, a run or an embedded name",
    )
    parser.add_argument(
        "--beam_runner",
        help="let Apache Beam write the shards, on a cluster (`FlinkRunner`) or here "
        "(`DirectRunner`); flags that are unknown here are the runner's",
    )
    return parser
