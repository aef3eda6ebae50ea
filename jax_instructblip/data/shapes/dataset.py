"""The built-in datasets `shapes` and `shapes-captions`, with the contents of their splits.

    shapes            train, validation     question families that the model is tuned on (held in)
                      test                  the same families, other scenes
                      test_pairs            the same families, about held-out pairs (see below)
                      test_families         held-out families (never tuned on), scenes of `test`
    shapes-captions   train, validation     captions, on which the Q-Former is pre-trained

A family is a kind of question (`tasks.py`). A held-out pair is a color and a shape that never occur
together in training (`world.py`). The datasets are drawn and written on first use, which takes
seconds, into the folder given, else `$JAX_INSTRUCTBLIP_CACHE`, else `runs/data`.
"""

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

from jax_instructblip.data.prepare import builder
from jax_instructblip.data.records import Record
from jax_instructblip.data.shapes import tasks
from jax_instructblip.data.shapes.tasks import CAPTION_FAMILIES, FAMILIES, HELD_IN, HELD_OUT, Family
from jax_instructblip.progress import Progress

VERSION = "1.2.0"  # raise it where a scene, a picture, a question or a stored field changes
SEED = 0

_IN = {name: FAMILIES[name] for name in HELD_IN}
_OUT = {name: FAMILIES[name] for name in HELD_OUT}
# Dataset -> split -> (stream of scenes, number of scenes, families asked).
DATASETS: dict[str, dict[str, tuple[str, int, dict[str, Family]]]] = {
    "shapes": {
        "train": ("train", 6000, _IN),
        "validation": ("validation", 250, _IN),
        "test": ("test", 400, _IN),
        "test_pairs": ("test_pairs", 400, _IN),
        "test_families": ("test", 400, _OUT),
    },
    "shapes-captions": {
        "train": ("captions", 16_000, CAPTION_FAMILIES),
        "validation": ("validation", 250, CAPTION_FAMILIES),
    },
}


def default_folder() -> pathlib.Path:
    """Returns `$JAX_INSTRUCTBLIP_CACHE` or else `runs/data`, the folder of built-in datasets."""
    return pathlib.Path(os.environ.get("JAX_INSTRUCTBLIP_CACHE") or pathlib.Path("runs", "data"))


def prepare_shapes(
    folder: str | os.PathLike[str] | None = None,
    dataset: str = "shapes",
    *,
    scenes: Mapping[str, int] | None = None,
) -> pathlib.Path:
    """Returns the folder of the prepared dataset; draws and writes it first if it is absent.

    `folder` has all datasets; None means `default_folder`. `scenes`, split -> number of scenes,
    replaces the usual numbers of these splits; the result is then a dataset of its own, with the
    numbers in its name. `dataset` is "shapes" or "shapes-captions".

    Raises:
        ValueError: there is no such dataset or split.
    """
    sizes = _sizes(dataset, scenes)
    total = sum(sizes.values())
    with Progress(total, f"drawing {dataset}", "scenes") as progress:
        splits = {
            split: _records(stream, sizes[split], families, progress)
            for split, (stream, _, families) in DATASETS[dataset].items()
        }
        return builder.prepare(
            folder or default_folder(), _name(dataset, sizes), splits, version=VERSION
        )


def shapes_source(
    folder: str | os.PathLike[str] | None,
    split: str,
    dataset: str = "shapes",
    *,
    scenes: Mapping[str, int] | None = None,
) -> builder.RecordSource:
    """Returns the records of one split with random access; draws them first if they are absent.

    `folder`, `dataset` and `scenes` are as in `prepare_shapes`.

    Raises:
        ValueError: there is no such dataset or split.
    """
    sizes = _sizes(dataset, scenes)
    if split not in sizes:
        raise ValueError(
            f"{dataset} has no split {split!r}; its splits: {', '.join(sorted(sizes))}"
        )
    prepare_shapes(folder, dataset, scenes=scenes)
    name = _name(dataset, sizes)
    return builder.source(folder or default_folder(), name, split, version=VERSION)


def _sizes(dataset: str, scenes: Mapping[str, int] | None) -> dict[str, int]:
    if dataset not in DATASETS:
        raise ValueError(f"no dataset {dataset!r} of shapes; known: {', '.join(DATASETS)}")
    sizes = {split: count for split, (_, count, _) in DATASETS[dataset].items()}
    unknown = sorted(set(scenes or {}) - set(sizes))
    if unknown:
        raise ValueError(f"{dataset} has no splits {unknown}; its splits: {', '.join(sizes)}")
    return {**sizes, **(scenes or {})}


def _name(dataset: str, sizes: Mapping[str, int]) -> str:
    usual = {split: count for split, (_, count, _) in DATASETS[dataset].items()}
    return dataset if sizes == usual else "-".join([dataset, *map(str, sizes.values())])


def _records(
    stream: str, count: int, families: dict[str, Family], progress: Progress
) -> Callable[[], Iterator[Record]]:
    def iterate() -> Iterator[Record]:
        for index in range(count):
            yield from tasks.scene_records(SEED, stream, index, families)
            progress.update()

    return iterate
