import dataclasses
import json

import pytest
from PIL import Image

from jax_instructblip.__main__ import main
from jax_instructblip.data.datasets import get_dataset
from jax_instructblip.data.llava_json import read_llava_json
from jax_instructblip.data.prepare import builder, shards
from jax_instructblip.data.prepare.conversations import write_conversations
from jax_instructblip.data.prepare.identity import PrepareError
from tests.data.readers.test_scienceqa import PROBLEM, write


@pytest.fixture
def raw(tmp_path):
    """Three problems to train on, one without an image, and one of another split."""
    folder = tmp_path / "raw"
    folder.mkdir()
    train = PROBLEM | {"split": "train"}
    write(folder, **{"4": train, "5": train | {"image": None}, "6": train, "7": PROBLEM})
    for number in (4, 6):
        path = folder / f"images/train/{number}/image.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(path)
    return folder


def test_the_file_is_read_as_conversations(raw, tmp_path, capsys):
    out = tmp_path / "made" / "train.json"
    given = ["scienceqa_qcm", "--raw", raw, "--conversations", "--out", out]
    assert main(["prepare", *map(str, given)]) == 0
    assert capsys.readouterr().out == (
        f"{out}: 3 conversations of scienceqa_qcm train, 2 with an image; 12726 were expected, 3 "
        "are in the annotations\n"
    )
    records = read_llava_json(out)
    assert [record.id for record in records] == ["4", "5", "6"]
    assert [len(record.images) for record in records] == [1, 0, 1]
    assert records[0].answers == ("A map shows places. Rome is above. The answer is B.",)
    assert records[0].prompt.endswith("(B) Rome\n<image>")


def test_problems_without_an_image_are_prepared_too(raw, tmp_path):
    dataset = get_dataset("scienceqa_qcm")
    folder = shards.prepare(dataset, raw, tmp_path / "data", splits=["train"], workers=0)
    stored = list(builder.open_folder(folder, "train"))
    read = list(dataset.read(raw, "train"))
    assert [len(record.images) for record in stored] == [1, 0, 1]
    assert [dataclasses.replace(record, images=()) for record in stored] == [
        dataclasses.replace(record, images=()) for record in read
    ]
    unreadable = dataclasses.replace(read[1], prompt="a\udce4")
    note = shards.write_shard(tmp_path / "a", [unreadable, read[1]])
    assert [name for name, _ in note["left_out"]] == ["5"] and note["records"] == 1


def test_missing_images_are_left_out_up_to_a_share(raw, tmp_path):
    (raw / "images/train/6/image.png").unlink()
    dataset, out = get_dataset("scienceqa_qcm"), tmp_path / "a.json"
    with pytest.raises(PrepareError, match="1 of 3 images are not there: raw/images/train/6"):
        write_conversations(dataset, raw, out, max_missing=0.3)
    assert not out.exists()
    assert "; 1 left out, whose" in write_conversations(dataset, raw, out, max_missing=0.34)
    assert [row["id"] for row in json.loads(out.read_text())] == ["4", "5"]


@pytest.mark.parametrize(
    ("name", "splits", "out", "message"),
    [
        ("vsr", [], "a.json", "vsr has no conversations to be written"),
        ("scienceqa_qcm", ["train", "val"], "a.json", "one file holds one split, 2 are named"),
        ("scienceqa_qcm", ["trian"], "a.json", "has no splits"),
        ("scienceqa_qcm", ["val"], "a.json", "has no record of the split 'val'"),
        ("scienceqa_qcm", [], "a.jsonl", "expected the name of a file that ends with .json"),
    ],
)
def test_what_cannot_be_written_is_refused(raw, tmp_path, name, splits, out, message):
    with pytest.raises(PrepareError, match=message):
        write_conversations(get_dataset(name), raw, tmp_path / out, splits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]
