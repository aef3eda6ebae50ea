"""Pictures and videos are found whatever their ending, each folder being listed once."""

import json
import os
import pathlib
import shutil

import pytest

from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.named_files import PICTURES, VIDEOS, NamedFiles
from jax_instructblip.data.readers.reading import read_ocrvqa
from tests.helpers.raw_layouts import LAYOUTS, write_all

# Whose annotations name a picture or a video without the ending of its file.
GUESSED = {
    **{"textcaps": "PNG", "gqa": "jpeg", "iconqa": "JPG", "vqav2": "Webp", "okvqa": "png"},
    **{"aokvqa": "JPEG", "textvqa": "gif", "vqav2_questions": "tif", "visual_dialog": "PNG"},
    **{"ocrvqa": "GIF", "msvd_qa": "MKV", "msrvtt_qa": "webm", "ivqa": "MOV"},
}


@pytest.mark.parametrize("name", GUESSED)
def test_files_of_other_endings_are_found(tmp_path, name):
    raw = write_all(tmp_path, [name])[name]
    split = LAYOUTS[name].split
    usual = [record.images for record in DATASETS[name].read(raw, split)]
    for image in {image for images in usual for image in images}:
        path = pathlib.Path(str(image))
        path.rename(path.with_suffix(f".{GUESSED[name]}"))
    found = [record.images for record in DATASETS[name].read(raw, split)]
    expected = [pathlib.Path(str(images[0])).with_suffix(f".{GUESSED[name]}") for images in usual]
    assert found == [(str(path),) for path in expected]
    assert all(path.is_file() for path in expected)


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize(
    ("there", "asked", "found"),
    [
        (["a.mp4", "a.avi"], "a", "a.mp4"),  # the usual ending first
        (["a.avi", "a.MP4"], "a", "a.MP4"),
        (["a.webm", "a.avi"], "a", "a.avi"),  # then the alphabet
        (["a.webm"], "a.mp4", "a.webm"),
        (["a.mp4", "a.mkv"], "a.mkv", "a.mkv"),  # what is named, where it is there
        (["a.json", "a.txt", "a.wav"], "a", "a.mp4"),  # none of them a video
        (["A.mp4"], "a", "a.mp4"),  # ids tell small letters from large ones
        (["a.b_1_2.MKV"], "a.b_1_2", "a.b_1_2.MKV"),
        (["a.b.avi"], "a", "a.mp4"),
        ([], "a.avi", "a.avi"),
    ],
)
def test_one_of_several_files(tmp_path, there, asked, found):
    touch(tmp_path / "videos", *there)
    files = NamedFiles(tmp_path, VIDEOS)
    assert files.find("videos", asked, usual=".mp4") == str(tmp_path / "videos" / found)


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    touch(tmp_path / "images", *(f"{number}.PNG" for number in range(50)))
    listed, real = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or real(folder))
    files = NamedFiles(tmp_path, PICTURES)
    for number in range(60):
        files.find("images", str(number), usual=".jpg")
    assert listed == [str(tmp_path / "images")]


def test_a_name_that_leads_out_is_refused(tmp_path):
    files = NamedFiles(tmp_path, PICTURES)
    for parts in (("..", "a"), ("images", "../../a.jpg"), ("/etc/a",)):
        with pytest.raises(AnnotationError, match=r"line 3: the path .* leads out of the folder"):
            files.find(*parts, usual=".jpg", where="line 3")


def test_covers_keep_the_ending_of_their_address(shared, tmp_path):
    cases = shared / "data" / "cases"
    shutil.copy(cases / "ocrvqa_dataset.json", tmp_path / "dataset.json")
    usual = [record.images for record in read_ocrvqa(tmp_path, "train")]
    images = tmp_path / "images"
    assert usual == [(str(images / "k1.jpg"),), (str(images / "k2.gif"),)]  # for what is missing
    images.mkdir()
    shutil.copy(cases / "red.jpg", images / "k1.jpg")
    shutil.copy(cases / "cover2.gif", images / "k2.gif")
    assert [record.images for record in read_ocrvqa(tmp_path, "train")] == usual
    (images / "k2.gif").rename(images / "k2.jpg")  # as some archives have it
    assert next(iter(read_ocrvqa(tmp_path, "train"))).images == usual[0]
    assert list(read_ocrvqa(tmp_path, "train"))[1].images == (str(images / "k2.jpg"),)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("http://example.org/a.GIF?size=.png", "k.gif"),
        ("http://example.org/a.b/noending", "k.jpg"),
        ("", "k.jpg"),
        ("http://example.org/a.php", "k.jpg"),
    ],
)
def test_addresses_without_a_usable_ending(tmp_path, address, name):
    row = {"split": 1, "questions": ["Why?"], "answers": ["No"], "imageURL": address}
    (tmp_path / "dataset.json").write_text(json.dumps({"k": row}))
    (record,) = read_ocrvqa(tmp_path, "train")
    assert record.images == (str(tmp_path / "images" / name),)
