import json
import pathlib

import pytest

from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.captioning import (
    read_coco_caption,
    read_flickr30k,
    read_nocaps,
    read_textcaps,
    read_web_capfilt,
)


def write(folder: pathlib.Path, **files) -> pathlib.Path:
    """`folder` with these JSON files; a name's `__` is a slash."""
    for name, document in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    return folder


def briefly(records, raw):
    """(id, path below the folder, answers) of each record."""
    return [(r.id, str(pathlib.Path(r.images[0]).relative_to(raw)), r.answers) for r in records]


# The layouts, by hand


KARPATHY = {
    "images": [
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000042.jpg",
            "cocoid": 42,
            "split": split,
            "sentences": [{"raw": f"{split} a."}, {"raw": f"{split} b.\n"}],
        }
        | ({"filename": "COCO_val2014_000000000007.jpg", "cocoid": 7} if split == "test" else {})
        for split in ("val", "test")
    ]
    + [
        {
            "filepath": f"{folder}2014",
            "filename": f"COCO_{folder}2014_{number:012d}.jpg",
            "cocoid": number,
            "split": split,
            "sentences": [{"raw": "a cat"}, {"raw": "a cat"}],
        }
        for folder, number, split in (("train", 9, "train"), ("val", 11, "restval"))
    ]
}
TRAINED = [
    ("9:0", "train2014/COCO_train2014_000000000009.jpg", ("a cat",)),
    ("9:1", "train2014/COCO_train2014_000000000009.jpg", ("a cat",)),
    ("11:0", "val2014/COCO_val2014_000000000011.jpg", ("a cat",)),
    ("11:1", "val2014/COCO_val2014_000000000011.jpg", ("a cat",)),
]


@pytest.mark.parametrize(
    "split, expected",
    [
        ("train", TRAINED),
        ("val", [("42", "val2014/COCO_val2014_000000000042.jpg", ("val a.", "val b."))]),
        ("test", [("7", "val2014/COCO_val2014_000000000007.jpg", ("test a.", "test b."))]),
    ],
)
def test_coco_by_karpathy(tmp_path, split, expected):
    records = list(read_coco_caption(write(tmp_path, dataset_coco=KARPATHY), split))
    assert briefly(records, tmp_path) == expected
    assert {(r.prompt, r.task, r.split) for r in records} == {("", "coco_caption", split)}


def test_coco_by_lavis_gives_the_records_of_karpathy(tmp_path):
    rows = [
        {"image": image, "caption": answers[0], "image_id": f"coco_{name}"}
        for name, image, answers in TRAINED
    ]
    val = [{"image": "val2014/COCO_val2014_000000000042.jpg", "caption": ["val a.", "val b.\n"]}]
    write(tmp_path, coco_karpathy_train=rows, coco_karpathy_val=val)
    assert briefly(read_coco_caption(tmp_path, "train"), tmp_path) == TRAINED
    theirs = list(read_coco_caption(tmp_path, "val"))
    write(tmp_path, dataset_coco=KARPATHY)
    assert list(read_coco_caption(tmp_path, "val")) == theirs


def test_web_capfilt(tmp_path):
    rows = [{"image": f"part0/{n}.jpg", "caption": f"picture {n}"} for n in "ab"]
    assert briefly(read_web_capfilt(write(tmp_path, annotation=rows), "train"), tmp_path) == [
        ("0", "part0/a.jpg", ("picture a",)),
        ("1", "part0/b.jpg", ("picture b",)),
    ]


NOCAPS = {
    "images": [{"id": 0, "file_name": "0013.jpg", "open_images_id": "0013", "domain": "in-domain"}],
    "annotations": [{"image_id": 0, "id": n, "caption": f"a house {n}"} for n in range(2)],
}
HOUSE = [("0", "val/0013.jpg", ("a house 0", "a house 1"))]


def test_nocaps_as_released_and_by_lavis(tmp_path):
    lavis = [{"image": "val/0013.jpg", "img_id": 0, "caption": ["a house 0", "a house 1"]}]
    write(tmp_path, nocaps_val=lavis)
    assert briefly(read_nocaps(tmp_path, "val"), tmp_path) == HOUSE
    write(tmp_path, nocaps_val_4500_captions=NOCAPS, nocaps_val=[])
    assert briefly(read_nocaps(tmp_path, "val"), tmp_path) == HOUSE


def test_hidden_captions_of_nocaps(tmp_path):
    write(tmp_path, nocaps_test_image_info={"images": NOCAPS["images"]})
    assert briefly(read_nocaps(tmp_path, "test"), tmp_path) == [("0", "test/0013.jpg", ())]


def test_flickr_by_karpathy_and_by_lavis(tmp_path):
    image = {"filename": "36.jpg", "split": "test", "sentences": [{"raw": "Two."}, {"raw": "2."}]}
    train = [{"image": "flickr30k-images/8.jpg", "caption": text} for text in ("One.", "1.")]
    expected = [("36", "flickr30k-images/36.jpg", ("Two.", "2."))]
    lavis = [{"image": "flickr30k-images/36.jpg", "caption": ["Two.", "2."]}]
    write(tmp_path, flickr30k_test=lavis, flickr30k_train=train)
    assert briefly(read_flickr30k(tmp_path, "test"), tmp_path) == expected
    assert briefly(read_flickr30k(tmp_path, "train"), tmp_path) == [
        ("8:0", "flickr30k-images/8.jpg", ("One.",)),
        ("8:1", "flickr30k-images/8.jpg", ("1.",)),
    ]
    write(tmp_path, dataset_flickr30k={"images": [image, image | {"split": "val"}]})
    assert briefly(read_flickr30k(tmp_path, "test"), tmp_path) == expected


@pytest.fixture
def textcaps(tmp_path):
    rows = [
        {"image_id": image, "caption_str": text, "reference_strs": [text], "image_classes": []}
        for image, text in (("c1", "a NOKIA phone"), ("d2", "a sign"), ("c1", "a phone"))
    ]
    words = {"data": [{"image_id": "c1", "ocr_tokens": ["NOKIA", " ", "7"], "ocr_info": []}]}
    document = {"dataset_name": "textcaps", "dataset_version": 0.1, "data": rows}
    hidden = {"data": [{"image_id": "e3", "image_classes": []}]}
    for split in ("train", "val", "test"):
        write(
            tmp_path,
            **{
                f"TextCaps_0.1_{split}": hidden if split == "test" else document,
                f"TextVQA_Rosetta_OCR_v0.2_{split}": words,
            },
        )
    return tmp_path


@pytest.mark.parametrize(
    "split, expected",
    [
        (
            "train",
            [
                ("c1:0", "train_images/c1.jpg", ("a NOKIA phone",)),
                ("c1:1", "train_images/c1.jpg", ("a phone",)),
                ("d2:0", "train_images/d2.jpg", ("a sign",)),
            ],
        ),
        (
            "val",
            [
                ("c1", "train_images/c1.jpg", ("a NOKIA phone", "a phone")),
                ("d2", "train_images/d2.jpg", ("a sign",)),
            ],
        ),
        ("test", [("e3", "test_images/e3.jpg", ())]),
    ],
)
def test_textcaps(textcaps, split, expected):
    records = list(read_textcaps(textcaps, split))
    assert briefly(records, textcaps) == expected
    assert [r.ocr for r in records] == [
        ("NOKIA", "7") if r.id.startswith("c1") else () for r in records
    ]


# Real files, whole


def linked(folder: pathlib.Path, **files: pathlib.Path) -> pathlib.Path:
    for name, target in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    return folder


def test_official_captions_of_coco_val2017(tmp_path, shared):
    source = shared / "data/captioning/captions_val2017.json"
    raw = linked(tmp_path, **{"annotations__captions_val2017.json": source})
    records = list(read_coco_caption(raw, "val2017"))
    assert len(records) == 5000
    assert sum(len(r.answers) for r in records) == 25014
    by_id = {r.id: r for r in records}
    assert records[0].id == "397133"
    assert records[0].images == (str(raw / "val2017/000000397133.jpg"),)
    assert records[0].answers == (
        "A man is in a kitchen making pizzas.",
        "Man in apron standing on front of oven with pans and bakeware",
        "A baker is working in the kitchen rolling dough.",
        "A person standing by a stove in a kitchen.",
        "A table with pies being made and a person standing near a wall with pots and pans "
        "hanging on the wall.",
    )
    assert records[4999].id == "15335"
    assert records[4999].answers[4] == (
        "a young child, lady , and man sitting in a booth at a table"
    )
    assert "An all white kitchen with an electric stovetop." in by_id["109976"].answers


def test_list_of_nocaps_images_without_captions(tmp_path, shared):
    source = shared / "data/captioning/nocaps/nocaps_val_images.json"
    raw = linked(tmp_path, **{"nocaps_val.json": source})
    records = briefly(read_nocaps(raw, "val"), raw)
    assert len(records) == 4500
    assert records[0] == ("0", "val/0013ea2087020901.jpg", ())
    assert records[1] == ("1", "val/0032257bf3cd56d0.jpg", ())
    assert records[4499] == ("4499", "val/fe7ed0dac010fdf0.jpg", ())


def flickr_lines(folder, shared):
    source = shared / "data/captioning/flickr30k"
    names = {f"test_2016.{n}.en": source / f"test_2016.{n}.en.txt" for n in range(1, 6)}
    return linked(folder, **names, **{"test_2016_images.txt": source / "test_2016_images.txt"})


def test_flickr_test_lines_of_multi30k(tmp_path, shared):
    raw = flickr_lines(tmp_path, shared)
    records = briefly(read_flickr30k(raw, "test"), raw)
    assert len(records) == 1000
    assert {len(answers) for _, _, answers in records} == {5}
    assert records[0] == (
        "1007129816",
        "flickr30k-images/1007129816.jpg",
        (
            "The man with pierced ears is wearing glasses and an orange hat.",
            "A man with glasses is wearing a beer can crocheted hat.",
            "A man with gauges and glasses is wearing a Blitz hat.",
            "A man in an orange hat starring at something.",
            "A man wears an orange hat and glasses.",
        ),
    )
    assert records[1][2][4] == "A Boston terrier is running in the grass."
    assert records[999][0] == "97234558"
    assert records[999][2][4] == "A child playing in the ocean."


def test_a_line_too_few(tmp_path, shared):
    raw = flickr_lines(tmp_path, shared)
    text = (raw / "test_2016.3.en").read_text()
    (raw / "test_2016.3.en").unlink()
    (raw / "test_2016.3.en").write_text(text[: text.rindex("\n", 0, -1) + 1])
    with pytest.raises(AnnotationError, match=r"equally many lines: .*'test_2016.3.en': 999"):
        list(read_flickr30k(raw, "test"))


# Files that cannot be used


COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}],
    "annotations": [{"image_id": 1, "id": 5, "caption": "a cup"}],
}
LAVIS = [{"image": "val2014/COCO_val2014_000000000042.jpg", "caption": ["a"]}]


@pytest.mark.parametrize(
    "split, files, message",
    [
        (
            "val",
            {},
            "lacks files of split 'val': dataset_coco.json, or else coco_karpathy_val.json",
        ),
        ("dev", {}, "split 'dev' is not known, expected one of test, train, train2014"),
        ("val", {"dataset_coco": LAVIS}, "found a list at the top, expected an object"),
        ("val", {"coco_karpathy_val": COCO}, "found an object at the top, expected a list"),
        ("val", {"dataset_coco": COCO}, r"images\[0\]: no field 'split'; found id, file_name"),
        ("val", {"dataset_coco": {"data": []}}, "no field 'images'; found data"),
        ("val", {"coco_karpathy_val": [{"url": "a", "caption": "b"}]}, "row 0: no field 'image'"),
        ("val", {"coco_karpathy_val": [{"image": LAVIS[0]["image"]}]}, "row 0: no field 'caption'"),
        (
            "val",
            {"coco_karpathy_val": [LAVIS[0] | {"caption": []}]},
            "row 0: caption holds nothing",
        ),
        ("val", {"coco_karpathy_val": [LAVIS[0] | {"caption": [" "]}]}, "only blank texts"),
        (
            "val",
            {"coco_karpathy_val": [LAVIS[0] | {"caption": [3]}]},
            r"caption\[0\]: found a whole number",
        ),
        (
            "val",
            {"coco_karpathy_val": [LAVIS[0] | {"image": "cat.jpg"}]},
            "COCO image, as COCO_val2014",
        ),
        (
            "val",
            {"coco_karpathy_val": [LAVIS[0] | {"image": "../COCO_val2014_000000000042.jpg"}]},
            "row 0: the path .* leads out of the folder",
        ),
        (
            "val",
            {"coco_karpathy_val": [*LAVIS, LAVIS[0] | {"image": "COCO_val2014_000000000042.jpg"}]},
            "id '42' of coco_caption val is used twice: by records 0 and 1",
        ),
        (
            "val2017",
            {"annotations__captions_val2017": COCO | {"images": COCO["images"] * 2}},
            "id '1' of coco_caption val2017 is used twice",
        ),
        (
            "val2017",
            {"annotations__captions_val2017": COCO | {"annotations": []}},
            "image 1: captions holds nothing",
        ),
        (
            "val2017",
            {"annotations__captions_val2017": COCO | {"images": []}},
            "1 images have captions but no row in images, such as 1",
        ),
        (
            "val2017",
            {
                "annotations__captions_val2017": COCO
                | {"images": [{"id": 1, "file_name": "/1.jpg"}]}
            },
            r"images\[0\]: the path '/1.jpg' leads out",
        ),
    ],
)
def test_coco_files_that_cannot_be_used(tmp_path, split, files, message):
    with pytest.raises(AnnotationError, match=message):
        list(read_coco_caption(write(tmp_path, **files), split))


def test_textcaps_needs_its_words(textcaps):
    (textcaps / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(AnnotationError, match="lacks files .*: TextVQA_Rosetta_OCR_v0.2_val.json"):
        list(read_textcaps(textcaps, "val"))


def test_absolute_paths_of_web_images_are_refused(tmp_path):
    write(tmp_path, annotation=[{"image": "/export/a.jpg", "caption": "a"}])
    with pytest.raises(AnnotationError, match="row 0: the path '/export/a.jpg' leads out"):
        list(read_web_capfilt(tmp_path, "train"))


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "test_2016_images.txt").write_bytes(b"\xef\xbb\xbf8.jpg\r\n9.jpg\r\n")
    for n in range(1, 6):
        (tmp_path / f"test_2016.{n}.en").write_bytes(b"A dog.\r\nA caf\xc3\xa9.\r\n")
    assert briefly(read_flickr30k(tmp_path, "test"), tmp_path) == [
        ("8", "flickr30k-images/8.jpg", ("A dog.",) * 5),
        ("9", "flickr30k-images/9.jpg", ("A café.",) * 5),
    ]


def test_captions_that_are_not_utf8(tmp_path):
    (tmp_path / "nocaps_val.json").write_bytes('[{"image": "é.jpg"}]'.encode("latin-1"))
    with pytest.raises(AnnotationError, match="nocaps_val.json is not UTF-8"):
        list(read_nocaps(tmp_path, "val"))


def test_the_domain_of_a_nocaps_image_stands_behind_its_name(tmp_path):
    images = [row | {"domain": "near-domain"} for row in NOCAPS["images"]]
    write(tmp_path, nocaps_val_4500_captions=NOCAPS | {"images": images})
    (record,) = read_nocaps(tmp_path, "val")
    assert record.task == "nocaps/near-domain"
    images = [{"id": 0, "file_name": "0013.jpg"}]
    write(tmp_path, nocaps_val_4500_captions=NOCAPS | {"images": images})
    (record,) = read_nocaps(tmp_path, "val")
    assert record.task == "nocaps"
    images = [row | {"domain": 3} for row in NOCAPS["images"]]
    write(tmp_path, nocaps_val_4500_captions=NOCAPS | {"images": images})
    with pytest.raises(AnnotationError, match=r"images\[0\].*domain"):
        list(read_nocaps(tmp_path, "val"))
