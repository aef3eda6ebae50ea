"""A dataset of pictures of one colour, for tests that any dataset would do for."""

from pathlib import Path

from PIL import Image

from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.records import Record

COUNT = 25


def read(raw, split):
    """A reader whose pictures are 0.png ... 4.png in turn."""
    for index in range(COUNT):
        image = str(raw / f"{index % 5}.png")
        yield Record(f"r{index}", (image,), f"what is {index}?", ("a",), task="toy", split=split)


TOY = Dataset(
    name="toy",
    family="image question answering",
    held_in=True,
    read=read,
    files={"train": ("toy.json",), "test": ("toy.json",)},
    counts={"train": COUNT},
    templates="question",
    licence="",
    source="",
)


def write_raw(folder: Path) -> Path:
    """The folder, with the files that `TOY` is read from."""
    folder.mkdir()
    (folder / "toy.json").touch()
    for value in range(5):
        Image.new("RGB", (8, 6), (value, 0, 0)).save(folder / f"{value}.png")
    return folder
