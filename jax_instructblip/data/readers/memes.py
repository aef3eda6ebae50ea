"""Hateful Memes: is a picture with its words hateful?

`raw` is the folder of the original files; `split` is a key of `FILES`.
"""

import pathlib
from collections.abc import Iterator

from jax_instructblip.data.readers.annotations import (
    AnnotationError,
    field,
    inside,
    pick_layout,
    read_json_lines,
    text_of,
    unique,
)
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.records import Record

CHOICES = ("yes", "no")
FILES = {
    "train": ("train.jsonl",),
    "val": ("dev_seen.jsonl",),
    "test": ("test_seen.jsonl",),
    "val_unseen": ("dev_unseen.jsonl",),
    "test_unseen": ("test_unseen.jsonl",),
}
OLDER = {"val": ("dev.jsonl",), "test": ("test.jsonl",)}


def read_hateful_memes(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields one record a meme: its text is the context, the choices are "yes" (hateful) and "no".

        {"id": 8291, "img": "img/08291.png", "label": 1, "text": "..."}

    A meme without label, as in the older release's test set, has no answer and no right choice.
    """
    _, (path,) = pick_layout(raw, split, FILES, OLDER)
    return unique(_records(raw, split, path))


def _records(raw: pathlib.Path, split: str, path: pathlib.Path) -> Iterator[Record]:
    for where, row in read_json_lines(path):
        correct = -1
        if "label" in row:
            label = field(row, "label", int, where)
            if label not in (0, 1):
                raise AnnotationError(f"{where}: label is {label}, expected 0 or 1 (hateful)")
            correct = CHOICES.index("yes" if label else "no")
        yield Record(
            id=str(field(row, "id", (int, str), where)),
            images=(inside(raw, text_of(row, "img", where), where=where),),
            prompt="Is it hateful?",
            answers=() if correct < 0 else (CHOICES[correct],),
            task="hateful_memes",
            choices=CHOICES,
            split=split,
            correct=correct,
            context=text_of(row, "text", where),
        )


DATASETS: tuple[Dataset, ...] = (
    Dataset(
        name="hateful_memes",
        family="image classification",
        held_in=False,
        read=read_hateful_memes,
        files=FILES,
        rerelease=OLDER,
        counts={
            "train": 8_500,
            "val": 500,
            "test": 1_000,
            "val_unseen": 540,
            "test_unseen": 2_000,
        },
        templates="question",
        licence="for research only, by Meta's agreement",
        source="https://ai.meta.com/tools/hatefulmemes (the page of the competition is gone)",
        notes="Images in img/. val and test are the seen sets; the other release is the older one, "
        "without labels in test. Public copies lack about a fifth of the images of the dev and "
        "unseen sets. UNVERIFIED: on which split InstructBLIP was scored, and how it made one "
        "score of its words (yes and true against no and false).",
    ),
)
