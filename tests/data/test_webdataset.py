"""Tars of img2dataset as records: usable and unusable entries, in a fixed order."""

import json
import os
import pickle
import re
import tarfile

import numpy as np
import pytest

from jax_instructblip import stores
from jax_instructblip.data import webdataset
from jax_instructblip.data.images import ImageError, decode
from jax_instructblip.data.mixture import Mixture, Source
from jax_instructblip.data.sources import open_records
from jax_instructblip.data.webdataset import open_tars
from tests.helpers.tars import entry, picture, write_shards, write_tar


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv(stores.VARIABLE, str(tmp_path / "copies"))
    return tmp_path / "copies"


def records(folder, *members, name="00000.tar"):
    write_tar(folder / "tars" / name, [each for part in members for each in part])
    return list(open_tars(folder / "tars"))


def test_entries_are_records_in_the_order_of_the_tars(tmp_path):
    found = open_tars(write_shards(tmp_path / "tars", (3, 2)), task="cc3m", split="train")
    assert len(found) == 5
    assert [record.id for record in found] == [
        "00000/000000000", "00000/000000001", "00000/000000002", "00001/000010000",
        "00001/000010001",
    ]  # fmt: skip
    record = found[3]
    assert (record.answers, record.prompt) == (("dog 0 of 1",), "")
    assert (record.task, record.split, record.problem) == ("cc3m", "train", "")
    assert str(record.images[0]) == f"{tmp_path}/tars/00001.tar:000010000.jpg"
    assert record.images[0].read() == picture(100)
    np.testing.assert_array_equal(decode(record.images[0]), decode(picture(100)))
    for index in (-1, 5):
        with pytest.raises(IndexError, match=rf"record {index} of 5: TarRecords\(.*tars:train"):
            found[index]


@pytest.mark.parametrize("kind, ending", [("PNG", "png"), ("WEBP", "webp"), ("JPEG", "JPEG")])
def test_images_of_any_kind(kind, ending, tmp_path):
    members = [(f"./a/0.{ending}", picture(1, kind)), ("./a/0.txt", b"a dog")]
    (record,) = records(tmp_path, members)
    assert (record.id, record.problem) == ("00000/a/0", "")
    assert decode(record.images[0]).size == (8, 8)


def test_captions_are_of_the_json_or_else_of_the_text(tmp_path):
    image = ("jpg", picture(0))
    found = records(
        tmp_path,
        entry("0", "of both", txt=b" of the text\n"),
        entry("1", ["one", " two ", " "]),
        entry("2", None, txt="a café".encode()),
        [("3.jpg", image[1]), ("3.txt", b"\xef\xbb\xbfof the text\n")],
        [("4.jpg", image[1]), ("4.json", b'{"caption": "of the json"}')],
    )
    assert [record.problem for record in found] == [""] * 5
    assert [record.answers for record in found] == [
        ("of both",), ("one", "two"), ("a café",), ("of the text",), ("of the json",),
    ]  # fmt: skip


BAD = {
    "no caption": (entry("k", None), "its caption is blank"),
    "a blank caption": (entry("k", " "), "its caption is blank"),
    "no sidecar": ([("k.jpg", picture(0))], "no caption: neither .json nor .txt"),
    "no field": (
        [("k.jpg", picture(0)), ("k.json", b'{"url": "u"}')],
        "no caption in its .json or .txt",
    ),
    "no image": ([("k.txt", b"a dog")], r"no image among its files \(.txt\), expected one"),
    "two images": (
        entry("k", "a dog", png=picture(0, "PNG")),
        r"2 images among its files \(.jpg, .json, .txt, .png\)",
    ),
    "a file twice": (entry("k", "a dog") + [("k.txt", b"a cat")], r"a file twice \(.jpg"),
    "a number": (entry("k", 7), "caption in its .json is int 7, expected text or a list of texts"),
    "a list of numbers": (entry("k", [7]), "caption in its .json is a list, expected text or a"),
    "a list": (entry("k", "", json=b"[1]"), "its .json is a list, expected an object"),
    "no JSON": (entry("k", "", json=b"{"), "its .json is not valid JSON"),
    "another encoding": (
        [("k.jpg", picture(0)), ("k.txt", "café".encode("latin-1"))],
        "its .txt is not UTF-8: unexpected end of data at byte 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_entries_that_are_no_pair_have_a_problem(case, tmp_path):
    members, problem = BAD[case]
    before, bad, after = records(tmp_path, entry("a", "dog"), members, entry("z", "cat"))
    assert (before.problem, after.problem) == ("", "")
    assert (bad.id, bad.answers) == ("00000/k", ())
    (reason,) = bad.text_problems()
    assert reason == bad.problem
    assert re.match(problem, reason), reason


def test_a_key_that_is_used_again(tmp_path):
    found = records(tmp_path, entry("a", "dog"), entry("b", "cat"), entry("a", "bird"))
    assert [(record.id, record.problem) for record in found] == [
        ("00000/a", ""), ("00000/b", ""), ("00000/a", "its key is used before in the tar"),
    ]  # fmt: skip


def test_hidden_files_folders_and_links_are_passed_over(tmp_path):
    path = write_tar(tmp_path / "tars/00000.tar", [("x/._a.jpg", b"x"), *entry("a", "dog")])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("b.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    assert [record.id for record in open_tars(tmp_path / "tars")] == ["00000/a"]


def cut(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


def offset(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


@pytest.mark.parametrize("extra, whole", [(0, 2), (300, 2), (512, 2), (520, 2), (1024, 3)])
def test_a_tar_that_is_cut_off_has_a_record_for_each_lost_entry(extra, whole, tmp_path):
    """Before a header, in it, after it, in the content, after all that a pair needs."""
    folder = write_shards(tmp_path / "tars", (5, 1))
    cut(folder / "00000.tar", offset(folder / "00000.tar", "000000002.json") + extra)
    found = list(open_tars(folder))
    assert [record.problem for record in found[:whole]] == [""] * whole
    assert [record.id for record in found[whole:]] == [
        *(f"00000/lost-{n + 1}" for n in range(5 - whole)),
        "00001/000010000",
    ]
    for record in found[whole:-1]:
        assert f"00000.tar is damaged or cut off after {whole} entries (" in record.problem
        assert record.problem.endswith("), 5 were written: get it again")


def test_without_counts_a_cut_is_one_record(tmp_path):
    folder = write_shards(tmp_path / "tars", (4,))
    (folder / "00000_stats.json").unlink()
    cut(folder / "00000.tar", offset(folder / "00000.tar", "000000002.jpg"))
    found = list(open_tars(folder))
    assert len(found) == 3
    assert "after 2 entries (no header and no end mark at byte" in found[2].problem
    assert found[2].problem.endswith("how many it lacks is not known: get it again")


def test_entries_that_the_counts_have_and_the_tar_has_not(tmp_path):
    folder = write_shards(tmp_path / "tars", (2,))
    (folder / "00000_stats.json").write_text('{"successes": 4}')
    found = list(open_tars(folder))
    assert [record.problem for record in found] == ["", ""] + 2 * [
        "00000.tar has 2 entries, 4 were written: get it again"
    ]


def test_what_is_no_tar_is_named_beside_the_others(tmp_path):
    folder = write_shards(tmp_path / "tars", (1,))
    (folder / "00001.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    (folder / "00002.tar").touch()
    assert [record.problem[:40] for record in open_tars(folder)] == [
        "", "00001.tar is damaged or cut off after 0 ", "00002.tar is damaged or cut off after 0 ",
    ]  # fmt: skip


def test_damaged_counts_and_empty_folders(tmp_path):
    folder = write_shards(tmp_path / "tars", (1,))
    (folder / "00000_stats.json").write_text("{")
    with pytest.raises(ValueError, match="00000_stats.json is not valid JSON"):
        open_tars(folder)
    with pytest.raises(FileNotFoundError, match=r"copies has no \*.tar"):
        open_tars(tmp_path / "copies")
    write_tar(tmp_path / "none/0.tar", [])
    with pytest.raises(ValueError, match="none: no entry in 1 tars; expected KEY.jpg and KEY.txt"):
        open_tars(tmp_path / "none")


def test_tars_without_one_pair(tmp_path):
    """Files in alphabetical order of their endings are no neighbours."""
    files = [(f"{n}.{ending}", b"x") for ending in ("jpg", "txt") for n in (1, 2)]
    write_tar(tmp_path / "apart/0.tar", files)
    with pytest.raises(ValueError, match=r"is a pair, KEY\.jpg followed(.|\n)*1: no caption"):
        open_tars(tmp_path / "apart")


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_an_index_that_lost_its_content_is_made_again(tmp_path, content):
    folder = write_shards(tmp_path / "tars", (2,))
    records = open_tars(folder)
    before, index = list(records), records._tars[0][1]
    index.unlink()
    index.write_bytes(content)
    assert list(open_tars(folder)) == before


def test_an_image_that_is_gone_since_the_index_was_made(tmp_path):
    folder = write_shards(tmp_path / "tars", (2,))
    record = open_tars(folder)[1]
    cut(folder / "00000.tar", record.images[0].offset + 3)
    with pytest.raises(ImageError, match=r"00000.tar:000000001.jpg: .* 3 of \d+ bytes are there"):
        decode(record.images[0])


def test_headers_are_read_once(tmp_path, copies, monkeypatch):
    folder = write_shards(tmp_path / "tars", (2, 2))
    before = list(open_tars(folder))
    scanned = []
    scan = webdataset.scan_tar
    monkeypatch.setattr(webdataset, "scan_tar", lambda *a: scanned.append(a[0].name) or scan(*a))
    assert list(open_tars(folder)) == before and not scanned
    write_tar(folder / "00001.tar", entry("a", "a dog"))
    (folder / "00001_stats.json").unlink()
    assert [record.id for record in open_tars(folder)][2:] == ["00001/a"]
    assert scanned == ["00001.tar"]
    assert len(list(copies.rglob("*.npy"))) == 2 and not list(copies.rglob("*.tmp"))


def test_workers_open_the_index_themselves(tmp_path):
    found = open_tars(write_shards(tmp_path / "tars", (2, 2)))
    sent = pickle.dumps(found)
    assert b"dog" not in sent and b"00001000" not in sent
    assert list(pickle.loads(sent)) == list(found)


# As a source of training


def test_a_folder_of_tars_is_a_source(tmp_path):
    folder = write_shards(tmp_path / "tars", (3, 2))
    found, digest = open_records(folder, "train")
    assert [record.split for record in found] == ["train"] * 5
    assert open_records(folder / "00001.tar", "train")[0][0].id == "00001/000010000"
    os.utime(folder / "00000.tar")  # another time, the same pairs
    assert open_records(folder, "train")[1] == digest
    write_tar(folder / "00001.tar", entry("000010000", "dog") + entry("000010001", "a longer one"))
    assert open_records(folder, "train")[1] != digest


def test_the_order_is_that_of_any_source_of_that_size(tmp_path):
    """Sample k is the record that a list of the same records has there, resumed or not."""
    folder = write_shards(tmp_path / "tars", (7, 4))
    found, digest = open_records(folder, "train")
    lines = tmp_path / "data.jsonl"
    rows = []
    for record in found:
        (tmp_path / f"{record.id[6:]}.jpg").write_bytes(record.images[0].read())
        row = {"id": record.id, "image": f"{record.id[6:]}.jpg", "prompt": " "}
        rows.append(json.dumps(row | {"answer": record.answers[0]}))
    lines.write_text("\n".join(rows))
    listed = Source("pairs", [*found], "")
    other = Source("other", [found[0]] * 3, "", weight=2.0)
    expected = Mixture([listed, other], 3)
    for start in (0, 9):
        again, same = open_records(folder, "train")  # as after a restart
        assert same == digest
        mixture = Mixture([Source("pairs", again, ""), other], 3)
        for place in range(start, 30):
            source, record = mixture.record(place)
            wanted = expected.record(place)
            assert (source.name, record) == (wanted[0].name, wanted[1])
