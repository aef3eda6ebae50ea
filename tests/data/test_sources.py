import json

import fsspec
import pytest
from PIL import Image

from jax_instructblip.data.records import RecordError
from jax_instructblip.data.sources import open_records
from tests.helpers.tars import write_shards


def write(folder, *splits):
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    lines = [
        {"id": str(i), "image": "a.png", "prompt": "what?", "answer": "x", "split": split}
        for i, split in enumerate(splits)
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_lines_without_a_split_are_of_any(tmp_path):
    path = write(tmp_path, "", "")
    assert [len(open_records(path, split)[0]) for split in ("train", "test")] == [2, 2]


def test_a_split_is_chosen(tmp_path):
    path = write(tmp_path, "train", "test", "train")
    assert [record.id for record in open_records(path, "train")[0]] == ["0", "2"]
    with pytest.raises(RecordError, match=r"no record of the split 'dev'.*\n.*'test', 'train'"):
        open_records(path, "dev")


def test_captions_need_no_prompt(tmp_path):
    path = write(tmp_path, "")
    path.write_text('{"image": "a.png", "answer": "a cup"}\n')
    records, _ = open_records(path, "train", need_prompts=False)
    assert [(record.prompt, record.answers) for record in records] == [("", ("a cup",))]
    with pytest.raises(RecordError, match="data.jsonl:1: prompt is missing"):
        open_records(path, "train")


def test_the_digest_is_of_content_and_split(tmp_path):
    path = write(tmp_path, "train", "test")
    digest = open_records(path, "train")[1]
    assert digest == open_records(path, "train")[1] != open_records(path, "test")[1]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert open_records(write(elsewhere, "train", "test"), "train")[1] == digest
    assert open_records(write(tmp_path, "train", "train"), "train")[1] != digest


def test_what_is_no_source_says_what_is():
    with pytest.raises(ValueError, match=r"no records at 'shape': .*\.jsonl.* shapes"):
        open_records("shape", "train")


def test_tars_in_a_store_are_copied(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_INSTRUCTBLIP_STORES", str(tmp_path / "copies"))
    folder = write_shards(tmp_path / "tars", (2, 1))
    fsspec.filesystem("memory").put(str(folder), "/pairs/cc3m", recursive=True)
    records, digest = open_records("memory://pairs/cc3m", "train")
    assert digest == open_records(folder, "train")[1]
    images = [record.images[0] for record in records]
    assert len(images) == 3 and all(str(tmp_path / "copies") in image.path for image in images)
