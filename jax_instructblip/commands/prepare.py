"""Turns the original files of a dataset into shards that training and evaluation read.

prepare DATASET --raw DIR --out DIR    reads DIR as it was downloaded, writes OUT/DATASET/VERSION
prepare --list                         every dataset: family, splits, files, counts, licence, source
prepare DATASET --raw DIR --preview --out PAGE.html    20 samples in pictures, and the lengths
"""

import argparse
import os
import pathlib
from collections.abc import Iterable, Iterator

from jax_instructblip.commands.flags import check_flags
from jax_instructblip.data import datasets
from jax_instructblip.data.mixture import Source
from jax_instructblip.data.prepare.beam import prepare_with_beam
from jax_instructblip.data.prepare.shards import prepare, read_report
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.records import Record
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.evaluation.reports.samples import draw, write_preview
from jax_instructblip.inference.loading import read_source
from jax_instructblip.progress import Progress

SAMPLES = 1000  # drawn for the page: the lengths are those of as many


def main(argv: list[str]) -> int:
    """Prepares one dataset and prints what was found; returns 0."""
    parser = argparse.ArgumentParser(
        prog="jax-instructblip prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", nargs="?", help="a name that --list prints")
    parser.add_argument("--list", action="store_true", help="print the table and end")
    parser.add_argument("--preview", action="store_true", help="write a page, prepare nothing")
    parser.add_argument("--raw", type=pathlib.Path, help="folder of its original files and images")
    parser.add_argument("--out", type=pathlib.Path, help="folder of prepared datasets")
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
        help="part of the records that may have no usable image (default: %(default)s)",
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
    flags, options = parser.parse_known_args(argv)
    check_flags(flags)
    if options and not flags.beam_runner:
        parser.error(f"unknown flags: {' '.join(options)}")
    if flags.list:
        print(datasets.table())
        return 0
    missing = [f"--{name}" for name in ("raw", "out") if getattr(flags, name) is None]
    if flags.dataset is None or missing:
        parser.error(f"expected {' and '.join(['DATASET'] * (flags.dataset is None) + missing)}")
    dataset = datasets.get_dataset(flags.dataset)
    splits = flags.split.split(",") if flags.split else ()
    if flags.preview:
        chosen = [*splits, *dataset.present(flags.raw), *dataset.files][0]
        _preview(dataset, flags.raw, chosen, flags)
        print(f"written: {flags.out}")
        return 0
    common = {"splits": splits, "max_missing": flags.max_missing, "frames": flags.frames}
    if flags.beam_runner:
        folder = prepare_with_beam(
            dataset, flags.raw, flags.out, runner=flags.beam_runner, options=options, **common
        )
    else:
        size = flags.shard_size
        folder = prepare(
            dataset, flags.raw, flags.out, workers=flags.workers, shard_size=size, **common
        )
    prepared = read_report(folder)["splits"]
    for name, split in prepared.items():
        print(f"{flags.dataset} {name}: {_counts(split)}")
    if absent := [name for name in dataset.files if name not in prepared]:
        print(f"not prepared: {', '.join(absent)}")
    print(f"prepared: {folder}")
    if not flags.raw.exists():
        print(f"{flags.raw} is not there (any more): what is prepared was not compared with it")
    return 0


def _preview(dataset: Dataset, raw: pathlib.Path, split: str, flags: argparse.Namespace) -> None:
    """Writes the page about a draw of the records of one split."""
    base = read_source(flags.checkpoint)
    text = TextProcessor.load(base.folder, base.variant, **base.limits)
    with Progress(dataset.counts.get(split), f"reading {dataset.name} {split}", "records") as line:
        drawn = draw(_counted(dataset.read(raw, split), line), SAMPLES)
    if not drawn:
        raise ValueError(f"{raw}: {dataset.name} has no record of the split {split!r}")
    source = Source(f"{dataset.name} {split}", drawn, "", templates=dataset.templates)
    write_preview(flags.out, source, text)


def _counted(records: Iterable[Record], line: Progress) -> Iterator[Record]:
    for record in records:
        yield record
        line.update()


def _counts(split: dict) -> str:
    """The counts of a split beside those that the table expects."""
    said = f"{split['records']} records"
    if split["left_out_count"]:
        said += f", {split['left_out_count']} left out (named in prepared.json)"
    if split["expected"] not in (None, split["read"]):
        said += f"; {split['expected']} were expected, {split['read']} are in the annotations"
    return said
