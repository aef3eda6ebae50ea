"""Visual reasoning: GQA (questions made from scene graphs) and VSR (true or false statements).

IconQA is of the same family, but has choices and is in `choices.py`. `raw` is the folder of the
original files, `split` a key of `GQA` or `VSR`.
"""

import collections
import pathlib
from collections.abc import Iterator

from jax_instructblip.data.readers.annotations import (
    AnnotationError,
    field,
    inside,
    pick_layout,
    read_json,
    read_json_lines,
    require,
    text_of,
    unique,
)
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.readers.named_files import PICTURES, NamedFiles
from jax_instructblip.data.records import Record

GQA = {split: (f"{split}_balanced_questions.json",) for split in ("train", "val", "testdev")}
VSR = {split: (f"splits/zeroshot/{split}.jsonl",) for split in ("train", "dev", "test")} | {
    f"random_{split}": (f"splits/random/{split}.jsonl",) for split in ("train", "dev", "test")
}
VSR_ANSWERS = ("false", "true")  # in the order of the labels 0 and 1


def read_gqa(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields GQA's balanced questions, from its own file or from LAVIS's.

    Images below `raw`: `images/n161313.jpg`.
    """
    _, (path,) = pick_layout(raw, split, GQA)
    return unique(_gqa(raw, split, path))


def read_vsr(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields VSR's true or false statements, of a zero-shot split or a random one (`random_...`).

    Images below `raw`: `images/000000017697.jpg`. The id of a record is its image and how many
    statements about that image came before.
    """
    _, (path,) = pick_layout(raw, split, VSR)
    return unique(_vsr(raw, split, path))


def _gqa(raw: pathlib.Path, split: str, path: pathlib.Path) -> Iterator[Record]:
    """Yields the records of GQA's own file or of LAVIS's.

    GQA's is a JSON object that has `imageId`, `question` and `answer` by question id; LAVIS's is a
    list of the same with `question_id` and `image` (a file name) instead of `imageId`.
    """
    document = read_json(path)
    pictures = NamedFiles(raw, PICTURES)
    released = isinstance(require(document, (dict, list), str(path)), dict)
    for number, item in enumerate(document.items() if released else document):
        name, row = item if released else ("", item)
        where = f"{path}: question {name}" if released else f"{path}: row {number}"
        require(row, dict, where)
        if released:
            image = text_of(row, "imageId", where)
        else:
            name = str(field(row, "question_id", (int, str), where))
            image = text_of(row, "image", where)
        yield Record(
            id=name,
            images=(pictures.find("images", image, usual=".jpg", where=where),),
            prompt=text_of(row, "question", where),
            answers=(text_of(row, "answer", where),),
            task="gqa",
            split=split,
        )


def _vsr(raw: pathlib.Path, split: str, path: pathlib.Path) -> Iterator[Record]:
    """Yields the records of a file with `{"image", "caption", "label": 0 or 1}` on each line."""
    before: collections.Counter[str] = collections.Counter()
    for where, row in read_json_lines(path):
        image = text_of(row, "image", where)
        label = field(row, "label", int, where)
        if label not in (0, 1):
            raise AnnotationError(f"{where}: label is {label}, expected 0 (false) or 1 (true)")
        yield Record(
            id=f"{pathlib.PurePosixPath(image).stem}:{before[image]}",
            images=(inside(raw, "images", image, where=where),),
            prompt=text_of(row, "caption", where),
            answers=(VSR_ANSWERS[label],),
            task="vsr",
            split=split,
            choices=VSR_ANSWERS,
            correct=label,
        )
        before[image] += 1


DATASETS = (
    Dataset(
        name="gqa",
        family="visual reasoning",
        held_in=False,
        read=read_gqa,
        files=GQA,
        counts={},
        templates="question",
        licence="CC BY 4.0",
        source="https://cs.stanford.edu/people/dorarad/gqa/download.html; "
        "LAVIS, under the same names: https://storage.googleapis.com/"
        "sfr-vision-language-research/LAVIS/datasets/gqa/testdev_balanced_questions.json",
        notes="Images in images/. The paper scores testdev, 12,578 questions (not verified).",
    ),
    Dataset(
        name="vsr",
        family="visual reasoning",
        held_in=False,
        read=read_vsr,
        files=VSR,
        counts={"test": 1_222, "dev": 340, "random_test": 2_195, "random_dev": 1_097},
        templates="question",
        licence="Apache-2.0; images: terms of Flickr",
        source="https://github.com/cambridgeltl/visual-spatial-reasoning (folder data)",
        notes="Images in images/. train, dev and test are the zero-shot split; the size of test "
        "differs between versions of the repository (another has 616). Whether the paper "
        "ranked true and false or generated is not known.",
    ),
)
