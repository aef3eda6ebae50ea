"""Captioning: COCO, Web CapFilt, NoCaps, Flickr30k, TextCaps.

`raw` is the folder of the original files; `split` is train, val or test where nothing else is said.
In training splits each caption is a record, `IMAGE:NUMBER`; in others each image is one record with
all its captions. White space around captions is removed: some of COCO's end in a line break, which
a model would learn.
"""

import collections
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jax_instructblip.data.readers.annotations import (
    AnnotationError,
    field,
    inside,
    pick_layout,
    read_json,
    read_lines,
    require,
    text_of,
    texts_of,
    unique,
)
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.readers.named_files import PICTURES, NamedFiles
from jax_instructblip.data.readers.rosetta import read_rosetta
from jax_instructblip.data.records import Record

Rows = list[dict[str, Any]]

_KARPATHY = ("train", "val", "test")
COCO_KARPATHY = {split: ("dataset_coco.json",) for split in _KARPATHY}
COCO_LAVIS = {split: (f"coco_karpathy_{split}.json",) for split in _KARPATHY}
COCO_OFFICIAL = {
    split: (f"annotations/captions_{split}.json",)
    for split in ("train2014", "val2014", "train2017", "val2017")
}
WEB_CAPFILT = {"train": ("annotation.json",)}
NOCAPS = {"val": ("nocaps_val_4500_captions.json",), "test": ("nocaps_test_image_info.json",)}
NOCAPS_LAVIS = {split: (f"nocaps_{split}.json",) for split in NOCAPS}
FLICKR_KARPATHY = {split: ("dataset_flickr30k.json",) for split in _KARPATHY}
FLICKR_LAVIS = {split: (f"flickr30k_{split}.json",) for split in _KARPATHY}
FLICKR_MULTI30K = {
    "test": ("test_2016_images.txt", *(f"test_2016.{n}.en" for n in range(1, 6))),
}
TEXTCAPS = {
    split: (f"TextCaps_0.1_{split}.json", f"TextVQA_Rosetta_OCR_v0.2_{split}.json")
    for split in ("train", "val", "test")
}


class _Image(NamedTuple):
    """An image: its id, path, captions, and the words that an OCR program read in it."""

    id: str
    path: str
    captions: tuple[str, ...]
    ocr: tuple[str, ...] = ()
    group: str = ""  # of the images that are scored apart, too


def read_coco_caption(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields COCO captions in Karpathy's split (his file or LAVIS's) or in an official split.

    Official splits are train2014, val2014, train2017 and val2017. Images below `raw`:
    `train2014/COCO_train2014_000000000009.jpg`, `train2017/000000000009.jpg` and so on.
    """
    layout, (path,) = pick_layout(raw, split, COCO_KARPATHY, COCO_LAVIS, COCO_OFFICIAL)
    if layout == 0:
        images = _karpathy(raw, path, split, "")
    elif layout == 1:
        images = _pooled(raw, path, "", _coco_number)
    else:
        images = _coco(raw, path, split)
    return _records("coco_caption", split, images)


def read_web_capfilt(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields web images with BLIP's synthetic captions (annotation.json), for the split train.

    Images lie below `raw` as the field `image` says.
    """
    _, (path,) = pick_layout(raw, split, WEB_CAPFILT)
    for number, row in enumerate(read_json(path, list)):
        where = f"{path}: row {number}"
        name = text_of(require(row, dict, where), "image", where)
        yield Record(
            id=str(number),
            images=(inside(raw, name, where=where),),
            prompt="",
            answers=(text_of(row, "caption", where),),
            task="web_capfilt",
            split=split,
        )


def read_nocaps(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields NoCaps, val or test; test captions are not public, and some copies of val have none.

    An image's domain, if the file has it, is part of its task: `nocaps/in-domain`.

    Images below `raw`: `val/0013ea2087020901.jpg`.
    """
    layout, (path,) = pick_layout(raw, split, NOCAPS, NOCAPS_LAVIS)
    if layout == 0:
        images = _coco(raw, path, split)
    else:
        images = _pooled(raw, path, split, _img_id, hidden=True)
    return _records("nocaps", split, images)


def read_flickr30k(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields Flickr30k in Karpathy's split (his file or LAVIS's); test also from Multi30K's texts.

    Images below `raw`: `flickr30k-images/1007129816.jpg`.
    """
    layout, paths = pick_layout(raw, split, FLICKR_KARPATHY, FLICKR_LAVIS, FLICKR_MULTI30K)
    folder = "flickr30k-images"
    if layout == 0:
        images = _karpathy(raw, paths[0], split, folder)
    elif layout == 1:
        images = _pooled(raw, paths[0], folder, _stem_of)
    else:
        images = _lines(raw, paths[0], paths[1:], folder)
    return _records("flickr30k", split, images)


def read_textcaps(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields TextCaps with Rosetta's OCR words; test captions are not public.

    Images below `raw`: `train_images/0054c91397f2fe05.jpg` for train and val, `test_images/...` for
    test.
    """
    _, (path, ocr) = pick_layout(raw, split, TEXTCAPS)
    return _records("textcaps", split, _textcaps(raw, path, split, read_rosetta(ocr)))


def _records(task: str, split: str, images: Iterable[_Image]) -> Iterator[Record]:
    return unique(_dressed(task, split, images))


def _dressed(task: str, split: str, images: Iterable[_Image]) -> Iterator[Record]:
    for image in images:
        captions = tuple(caption.strip() for caption in image.captions)
        groups = {image.id: captions}
        if split.startswith("train"):
            groups = {f"{image.id}:{n}": (caption,) for n, caption in enumerate(captions)}
        for name, answers in groups.items():
            yield Record(
                id=name,
                images=(image.path,),
                prompt="",
                answers=answers,
                task=f"{task}/{image.group}" if image.group else task,
                split=split,
                ocr=image.ocr,
            )


def _coco(raw: pathlib.Path, path: pathlib.Path, folder: str) -> Iterator[_Image]:
    """Yields the images of a file in COCO's format.

        {"images": [{"id", "file_name"}], "annotations": [{"image_id", "id", "caption"}]}

    Without `annotations` the captions are hidden; with them, each image must have one.
    """
    document = read_json(path, dict)
    captions: dict[str, list[str]] = collections.defaultdict(list)
    hidden = "annotations" not in document
    for number, row in enumerate(() if hidden else _rows(document, "annotations", path)):
        where = f"{path}: annotations[{number}]"
        captions[_number(row, "image_id", where)].append(field(row, "caption", str, where))
    shown = set()
    for number, row in enumerate(_rows(document, "images", path)):
        where = f"{path}: images[{number}]"
        image = _number(row, "id", where)
        shown.add(image)
        name = text_of(row, "file_name", where)
        captioned = {"captions": captions.get(image, [])}
        said = () if hidden else texts_of(captioned, "captions", f"{path}: image {image}")
        domain = field(row, "domain", str, where) if "domain" in row else ""
        yield _Image(image, inside(raw, folder, name, where=where), said, group=domain)
    stray = sorted(captions.keys() - shown)
    if stray:
        raise AnnotationError(
            f"{path}: {len(stray)} images have captions but no row in images, such as "
            f"{stray[0]}: the file is not whole, get it again"
        )


def _karpathy(raw: pathlib.Path, path: pathlib.Path, split: str, folder: str) -> Iterator[_Image]:
    """Yields images of Karpathy's split of COCO or, if `folder` names it, of Flickr30k.

        {"images": [{"filename", "filepath", "cocoid", "split", "sentences": [{"raw"}]}]}

    Flickr30k has neither `filepath` nor `cocoid`. COCO's split `restval` belongs to train.
    """
    splits = ("train", "restval") if split == "train" else (split,)
    for number, row in enumerate(_rows(read_json(path, dict), "images", path)):
        where = f"{path}: images[{number}]"
        if field(row, "split", str, where) not in splits:
            continue
        name = text_of(row, "filename", where)
        sentences = [
            field(require(each, dict, where), "raw", str, where)
            for each in field(row, "sentences", list, where)
        ]
        coco = not folder
        yield _Image(
            _number(row, "cocoid", where) if coco else _stem(name),
            inside(raw, text_of(row, "filepath", where) if coco else folder, name, where=where),
            texts_of({"sentences": sentences}, "sentences", where),
        )


def _pooled(
    raw: pathlib.Path,
    path: pathlib.Path,
    folder: str,
    name_of: Callable[[dict[str, Any], str], str],
    *,
    hidden: bool = False,
) -> Iterator[_Image]:
    """Yields the images of LAVIS's file, a JSON list of `{"image", "caption"}`.

    Rows of one image are joined where its first row is. `caption` is a text or a list of texts;
    with `hidden` it may be missing. An image without a folder in its name is in `folder`; `name_of`
    returns its id.
    """
    images: dict[str, _Image] = {}
    for number, row in enumerate(read_json(path, list)):
        where = f"{path}: row {number}"
        name = text_of(require(row, dict, where), "image", where)
        said: tuple[str, ...] = ()
        if "caption" in row or not hidden:
            caption = field(row, "caption", (str, list), where)
            captions = [caption] if isinstance(caption, str) else caption
            said = texts_of({"caption": captions}, "caption", where)
        before = images.get(name)
        if before is None:
            parts = (name,) if "/" in name or not folder else (folder, name)
            file = inside(raw, *parts, where=where)
            images[name] = _Image(name_of(row, where), file, said)
        else:
            images[name] = before._replace(captions=before.captions + said)
    yield from images.values()


def _lines(
    raw: pathlib.Path, names: pathlib.Path, captions: list[pathlib.Path], folder: str
) -> Iterator[_Image]:
    """Yields the images that a text file names; line n of each caption file is about image n."""
    columns = [read_lines(path) for path in (names, *captions)]
    lengths = {
        path.name: len(lines) for path, lines in zip((names, *captions), columns, strict=True)
    }
    if len(set(lengths.values())) > 1:
        raise AnnotationError(f"{names.parent}: the files have not equally many lines: {lengths}")
    for number, (name, *said) in enumerate(zip(*columns, strict=True), start=1):
        where = f"{names}:{number}"
        row = {"image": name, "captions": said}
        name = text_of(row, "image", where)
        yield _Image(
            _stem(name), inside(raw, folder, name, where=where), texts_of(row, "captions", where)
        )


def _textcaps(
    raw: pathlib.Path, path: pathlib.Path, split: str, ocr: dict[str, tuple[str, ...]]
) -> Iterator[_Image]:
    """Yields the images of TextCaps's file, whose JSON list `data` has one row a caption.

    A row has `image_id` and `caption_str`; those of test have no caption. `ocr` has the OCR words
    of each image by its id.
    """
    folder = "test_images" if split == "test" else "train_images"
    pictures = NamedFiles(raw, PICTURES)
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(_rows(read_json(path, dict), "data", path)):
        where = f"{path}: data[{number}]"
        said = captions.setdefault(text_of(row, "image_id", where), [])
        if split != "test":
            said.append(text_of(row, "caption_str", where))
    for image, said in captions.items():
        file = pictures.find(folder, image, usual=".jpg", where=f"{path}: image {image}")
        yield _Image(image, file, tuple(said), ocr.get(image, ()))


def _rows(document: dict[str, Any], name: str, path: pathlib.Path) -> Rows:
    rows = field(document, name, list, str(path))
    return [require(row, dict, f"{path}: {name}[{number}]") for number, row in enumerate(rows)]


def _number(row: dict[str, Any], name: str, where: str) -> str:
    return str(field(row, name, (int, str), where))


def _stem(name: str) -> str:
    return pathlib.PurePosixPath(name).stem


def _img_id(row: dict[str, Any], where: str) -> str:
    return _number(row, "img_id", where)


def _stem_of(row: dict[str, Any], where: str) -> str:
    return _stem(row["image"])


def _coco_number(row: dict[str, Any], where: str) -> str:
    """Returns the number in a COCO file name: 42 for `COCO_val2014_000000000042.jpg`."""
    digits = _stem(row["image"]).rpartition("_")[2]
    if not digits.isdecimal():
        raise AnnotationError(
            f"{where}: image {row['image']!r} does not end in the number of a COCO image, as "
            "COCO_val2014_000000000042.jpg does: is it another dataset's file?"
        )
    return str(int(digits))


_LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/datasets"

DATASETS = (
    Dataset(
        name="coco_caption",
        family="image captioning",
        held_in=True,
        read=read_coco_caption,
        files=COCO_KARPATHY | COCO_OFFICIAL,
        rerelease=COCO_LAVIS,
        counts={"train": 566_747, "test": 5_000, "val2017": 5_000},
        templates="caption",
        licence="captions CC BY 4.0; images: terms of Flickr",
        source="dataset_coco.json: https://cs.stanford.edu/people/karpathy/deepimagesent/"
        f"caption_datasets.zip; coco_karpathy_*.json: {_LAVIS}; annotations/ and images: "
        "https://cocodataset.org/#download",
        notes="Images in train2014/ and val2014/ (train2017/, val2017/). train, val and test are "
        "Karpathy's; train2017 and val2014 hold images of his test split.",
    ),
    Dataset(
        name="web_capfilt",
        family="image captioning",
        held_in=True,
        read=read_web_capfilt,
        files=WEB_CAPFILT,
        counts={},
        templates="caption",
        licence="not stated; the images belong to the owners of the web pages",
        source="not public: about 14 million (13,873,136 in LAVIS) web images with captions made "
        "and filtered by BLIP; lists of addresses and captions: https://github.com/salesforce/BLIP",
        notes='annotation.json is [{"image": path below the folder, "caption"}]. The lists of BLIP '
        "give addresses instead, many of them dead: fetch the images first.",
    ),
    Dataset(
        name="nocaps",
        family="image captioning",
        held_in=False,
        read=read_nocaps,
        files=NOCAPS,
        rerelease=NOCAPS_LAVIS,
        counts={"val": 4_500, "test": 10_600},
        templates="caption",
        licence="images CC BY 2.0 (Open Images)",
        source=f"https://nocaps.org/download; nocaps_*.json: {_LAVIS}",
        notes="Images in val/ and test/. Test captions are not public. CIDEr overall takes its "
        "word frequencies from the evaluated references: score the whole split.",
    ),
    Dataset(
        name="flickr30k",
        family="image captioning",
        held_in=False,
        read=read_flickr30k,
        files=FLICKR_KARPATHY,
        rerelease=FLICKR_LAVIS,
        counts={"test": 1_000},
        templates="caption",
        licence="research and education only; images: terms of Flickr",
        source="dataset_flickr30k.json: https://cs.stanford.edu/people/karpathy/deepimagesent/"
        f"caption_datasets.zip; flickr30k_*.json: {_LAVIS}; images on request: "
        "https://shannon.cs.illinois.edu/DenotationGraph",
        notes="Images in flickr30k-images/. Multi30K's test_2016_images.txt and "
        "test_2016.{1..5}.en are read as test too.",
    ),
    Dataset(
        name="textcaps",
        family="captioning with reading comprehension",
        held_in=True,
        read=read_textcaps,
        files=TEXTCAPS,
        counts={"train": 109_765},
        templates="caption",
        licence="CC BY 4.0",
        source="https://textvqa.org/textcaps/dataset (captions and images), "
        "https://textvqa.org/dataset (Rosetta OCR)",
        notes="Images in train_images/ (train and val) and test_images/. Test captions are not "
        "public. The words of Rosetta stand in front of the prompt.",
    ),
)
