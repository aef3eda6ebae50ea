"""The prepared `shapes` datasets: which split holds which scenes and which families of questions.

    shapes            train, validation     held-in families
                      test                  held-in families, other scenes
                      test_pairs            held-in families, about held-out pairs
                      test_families         held-out families, the scenes of `test`
    shapes-captions   train, validation     captions: what the Q-Former is pre-trained on

Both are drawn and written in some seconds, where they are absent, into a cache folder: the one
given, else `$JAX_INSTRUCTBLIP_CACHE`, else `runs/data`.
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
    """The folder of the datasets where none is named."""
    return pathlib.Path(os.environ.get("JAX_INSTRUCTBLIP_CACHE") or pathlib.Path("runs", "data"))


def prepare_shapes(
    folder: str | os.PathLike[str] | None = None,
    dataset: str = "shapes",
    *,
    scenes: Mapping[str, int] | None = None,
) -> pathlib.Path:
    """The folder of the prepared dataset, which is drawn and written first where it is absent.

    `scenes` changes the number of scenes of some splits (a dataset of its own then, with these
    numbers in its name).
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
    """Random access to the records of one split, prepared first where absent."""
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
