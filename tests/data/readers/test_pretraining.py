"""Readers of BLIP-2's pre-training pairs, and the way from tars to a prepared folder."""

import json

import pytest

from jax_instructblip.data.datasets import DATASETS, PRETRAINING, get_dataset, table
from jax_instructblip.data.prepare import builder, shards
from jax_instructblip.data.prepare.description import describe
from jax_instructblip.data.prepare.identity import PrepareError
from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.dataset import PAIRS
from jax_instructblip.data.readers.pretraining import read_visual_genome
from tests.helpers.tars import entry, picture, write_shards, write_tar


def write(folder, name, document):
    (folder / name).write_text(json.dumps(document))
    return folder


def test_the_table_of_pre_training():
    assert list(PRETRAINING) == ["visual_genome", "cc3m", "cc12m", "sbu", "laion"]
    assert not PRETRAINING.keys() & DATASETS.keys()
    text = table()
    for name, dataset in PRETRAINING.items():
        assert get_dataset(name) is dataset
        assert (dataset.name, dataset.family, dataset.held_in) == (name, PAIRS, None)
        assert f"{name}: image-caption pairs, pre-training" in text
        with pytest.raises(AnnotationError, match="'val' is not known, expected one of train"):
            list(dataset.read("raw", "val"))


# Visual Genome


def test_visual_genome_of_lavis(tmp_path):
    rows = [{"image": "VG_100K/1.jpg", "caption": " a man\n"}, {"image": "b.jpg", "caption": "b"}]
    found = list(read_visual_genome(write(tmp_path, "vg_caption.json", rows), "train"))
    assert [(each.id, each.images, each.answers) for each in found] == [
        ("0", (f"{tmp_path}/VG_100K/1.jpg",), ("a man",)),
        ("1", (f"{tmp_path}/b.jpg",), ("b",)),
    ]
    assert {(each.task, each.split, each.prompt) for each in found} == {
        ("visual_genome", "train", "")
    }


def test_regions_of_visual_genome(tmp_path):
    (tmp_path / "VG_100K_2").mkdir()
    (tmp_path / "VG_100K_2" / "2.jpg").write_bytes(picture(0))
    rows = [
        {
            "id": 2,
            "regions": [{"region_id": 7, "phrase": "a clock "}, {"region_id": 8, "phrase": ""}],
        },
        {"id": 3, "regions": [{"region_id": 9, "phrase": "a wall"}]},
    ]
    found = list(read_visual_genome(write(tmp_path, "region_descriptions.json", rows), "train"))
    assert [(each.id, each.images[0], each.answers) for each in found] == [
        ("2:7", f"{tmp_path}/VG_100K_2/2.jpg", ("a clock",)),
        ("3:9", f"{tmp_path}/VG_100K/3.jpg", ("a wall",)),
    ]


@pytest.mark.parametrize(
    "name, rows, message",
    [
        ("vg_caption.json", [7], "row 0: found a whole number, expected an object"),
        ("vg_caption.json", [{"image": "../a.jpg", "caption": "a"}], "leads out of the folder"),
        ("vg_caption.json", [{"image": "a.jpg", "caption": " "}], "row 0: caption is blank"),
        ("region_descriptions.json", [{"id": "a", "regions": []}], "row 0: id: found text"),
        ("region_descriptions.json", [{"id": 1}], "row 0: no field 'regions'; found id"),
        ("region_descriptions.json", [{"id": 1, "regions": [7]}], r"regions\[0\]: found a whole"),
        (
            *("region_descriptions.json", [{"id": 1, "regions": [{"region_id": 1, "phrase": 5}]}]),
            r"regions\[0\]: phrase: found a whole number, expected text",
        ),
    ],
)
def test_bad_rows_of_visual_genome(name, rows, message, tmp_path):
    with pytest.raises(AnnotationError, match=message):
        list(read_visual_genome(write(tmp_path, name, rows), "train"))


# Prepared


def test_a_folder_without_tars_is_named(tmp_path):
    write(tmp_path, "00000_stats.json", {})
    with pytest.raises(AnnotationError, match=r"lacks files of split 'train': \*.tar: `jax-instr"):
        shards.prepare(PRETRAINING["cc3m"], tmp_path, tmp_path / "data")


def test_tars_are_prepared_as_any_dataset_is(tmp_path):
    raw = write_shards(tmp_path / "raw", (5, 4))
    dataset = PRETRAINING["cc3m"]
    folder = shards.prepare(dataset, raw, tmp_path / "data", shard_size=4)
    stored = list(builder.open_folder(folder, "train"))
    read = list(dataset.read(raw, "train"))
    assert [each.id for each in stored] == [each.id for each in read]
    assert [each.answers for each in stored] == [each.answers for each in read]
    assert [each.images for each in stored] == [(each.images[0].read(),) for each in read]
    assert {each.task for each in stored} == {"cc3m"}
    assert list(describe(folder, dataset, raw))[0] == "cc3m train: 9 records"
    assert len(list(folder.glob("*.array_record*"))) == 3
    raw = raw.rename(tmp_path / "moved")
    assert shards.prepare(dataset, raw, tmp_path / "data", shard_size=4) == folder


def test_what_is_no_pair_is_left_out_counted_and_named_with_tar_and_key(tmp_path):
    raw = write_shards(tmp_path / "raw", (5, 4))
    damaged = picture(0)[:50]
    write_tar(
        raw / "00002.tar",
        entry("0", None)
        + [("1.txt", b"a dog")]
        + entry("2", "a dog", jpg=damaged)
        + [("3.jpg", picture(0)), ("3.txt", b"\xff")]
        + entry("4", "a cat")
        + entry("5", "a bird")
        + entry("4", "a cat"),
    )
    with (raw / "00001.tar").open("r+b") as file:
        file.truncate(5_000)
    dataset = PRETRAINING["sbu"]
    with pytest.raises(PrepareError, match="sbu train: 8 of 16 records cannot be used") as e:
        shards.prepare(dataset, raw, tmp_path / "data", max_missing=0.1)
    assert "00001/lost-1: 00001.tar is damaged or cut off after 1 entries" in str(e.value)
    assert not (tmp_path / "data/sbu" / shards.VERSION).exists()
    folder = shards.prepare(dataset, raw, tmp_path / "data", max_missing=0.6)
    assert list(describe(folder, dataset, raw))[0] == (
        "sbu train: 8 records, 8 left out (named in prepared.json)"
    )
    found = {id: reason for id, reason in shards.read_report(folder)["splits"]["train"]["left_out"]}
    assert len(found) == 8
    assert found["00001/lost-3"].endswith("4 were written: get it again")
    assert found["00002/0"] == "its caption is blank"
    assert found["00002/1"] == "no image among its files (.txt), expected one"
    assert found["00002/2"] == "00002.tar:2.jpg: damaged or unreadable: Truncated File Read"
    assert found["00002/3"].startswith("its .txt is not UTF-8")
    assert found["00002/4"] == "its key is used before in the tar"
    assert str(tmp_path) not in str(found)


def test_a_killed_run_goes_on_and_other_tars_are_refused(tmp_path, monkeypatch):
    raw = write_shards(tmp_path / "raw", (5, 4))
    dataset = PRETRAINING["laion"]
    whole = shards.prepare(dataset, raw, tmp_path / "once", shard_size=2)
    write, written = shards.write_shard, []

    def write_two(path, records, frames):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, records, frames)

    monkeypatch.setattr(shards, "write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(dataset, raw, tmp_path / "data", shard_size=2)
    written.clear()
    monkeypatch.setattr(
        shards, "write_shard", lambda path, *rest: written.append(path.name) or write(path, *rest)
    )
    folder = shards.prepare(dataset, raw, tmp_path / "data", shard_size=2)
    assert len(written) == 3
    for path in whole.glob("*.array_record*"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    write_tar(raw / "00001.tar", entry("a", "another dog"))
    with pytest.raises(PrepareError, match="its 9 records are of other annotations than the"):
        shards.prepare(dataset, raw, tmp_path / "data", shard_size=2)
