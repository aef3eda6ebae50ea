"""Damaged prepared folders and unwritable places raise an error before any work is done."""

import json
import shutil

import pytest

from jax_instructblip.data.prepare import builder, shards
from tests.helpers.toy_data import TOY, write_raw


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "raw")


@pytest.mark.parametrize("name", ["file", "file/below", "a\udce9"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(raw, tmp_path, name):
    (tmp_path / "file").write_text("")
    shutil.rmtree(raw)
    raw.mkdir()  # whose files are then not looked for
    with pytest.raises(shards.PrepareError, match="--out .* cannot be used, .*: choose another"):
        shards.prepare(TOY, raw, tmp_path / name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"splits": None}, "splits is None, expected an object"),
        ({"splits": [1]}, r"splits is \[1\], expected an object"),
        ({"name": 5}, "name is 5, expected text"),
        ({"options": "x"}, "options is 'x', expected an object"),
    ],
)
def test_a_damaged_report_is_named(raw, tmp_path, change, said):
    folder = shards.prepare(TOY, raw, tmp_path / "out")
    path = folder / shards.REPORT
    path.write_text(json.dumps(shards.read_report(folder) | change))
    with pytest.raises(shards.PrepareError, match=f"prepared.json is damaged .*{said}.*again"):
        shards.read_report(folder)
    path.write_text("{}")
    with pytest.raises(shards.PrepareError, match="name is None.*splits is None"):
        shards.read_report(folder)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", ["", "null", "[]", '{"name": 5, "splits": 5}'])
def test_damaged_descriptions_are_told_with_their_folder(raw, tmp_path, name, content):
    folder = shards.prepare(TOY, raw, tmp_path / "out")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{folder} cannot be read .*: prepare or copy it again"):
        builder.open_folder(folder, "train")
