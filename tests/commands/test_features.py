"""`features`: shards of a first stage and of a model that answers, interrupted and resumed."""

import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import jax_instructblip
from jax_instructblip.__main__ import main
from jax_instructblip.atomic import sole_writer
from jax_instructblip.backbones.stage1 import write_stage1
from jax_instructblip.inference import feature_files
from jax_instructblip.inference.feature_files import read_shard
from tests.helpers.tiny import COLORS, compile_cache, write_base


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with compile_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def stage1(base):
    return write_stage1(base, base.parent / "stage1", features=12)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(5):
        name = f"more/{number}.png" if number > 2 else f"{number}.png"
        Image.new("RGB", (40, 30), (40 * number, 90, 10)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def lines(photos):
    rows = [
        {
            "id": f"row {number}",
            "image": f"{number}.png",
            "prompt": "what color is it?",
            "answers": list(COLORS)[: 2 - number % 2],
        }
        for number in range(3)
    ]
    path = photos / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(checkpoint, images, out, *more):
    return ["features", f"--checkpoint={checkpoint}", f"--images={images}", f"--out={out}", *more]


def shards(out, ending="npz"):
    return sorted(out.glob(f"*.{ending}"))


def paths(photos):
    return [str(path) for path in sorted(photos.rglob("*.png"))]


@pytest.mark.parametrize("form", ["raw", "projected", "normalised"])
def test_a_first_stage_gives_features_of_a_folder(stage1, photos, tmp_path, form, capsys):
    out = tmp_path / "out"
    assert main(words(stage1, photos, out, "--shard_size=2", f"--form={form}")) == 0
    assert str(out) in capsys.readouterr().out
    names = [path.name for path in shards(out)]
    assert names == [f"0000{number}-of-00003.npz" for number in range(3)]
    parts = [read_shard(path) for path in shards(out)]
    ids = [name for part in parts for name in part["id"]]
    assert ids == ["0.png", "1.png", "2.png", "more/3.png", "more/4.png"]
    blip = jax_instructblip.load(stage1)
    expected = blip.image_features(paths(photos), form=form)
    given = np.concatenate([part["image"] for part in parts])
    np.testing.assert_allclose(given, expected, atol=1e-5, rtol=0)
    assert given.dtype == np.float32 and "text" not in parts[0]


def test_captions_of_json_lines_have_features_too(stage1, lines, tmp_path):
    assert main(words(stage1, lines, tmp_path / "out", "--shard_size=2")) == 0
    first, second = map(read_shard, shards(tmp_path / "out"))
    assert first["caption"].tolist() == ["red", "green", "red"]
    assert first["text_of"].tolist() == [0, 0, 1] and second["text_of"].tolist() == [0, 0]
    assert first["id"].tolist() == ["row 0", "row 1"]
    blip = jax_instructblip.load(stage1)
    expected = blip.text_features(["red", "green", "red"])
    np.testing.assert_allclose(first["text"], expected, atol=1e-5, rtol=0)


def test_a_model_that_answers_gives_its_visual_vectors(base, photos, lines, tmp_path):
    blip = jax_instructblip.load(base)
    assert main(words(base, photos, tmp_path / "a", "--prompt=what?")) == 0
    (part,) = map(read_shard, shards(tmp_path / "a"))
    assert part["prompt"].tolist() == ["what?"] * 5
    expected = blip.features(paths(photos), ["what?"])
    np.testing.assert_allclose(part["image"], expected, atol=1e-5, rtol=0)
    assert main(words(base, lines, tmp_path / "b")) == 0
    (part,) = map(read_shard, shards(tmp_path / "b"))
    expected = blip.features(paths(photos)[:3], ["what color is it?"])
    np.testing.assert_allclose(part["image"], expected, atol=1e-5, rtol=0)


def test_record_files_hold_a_record_per_image(stage1, lines, tmp_path):
    reader = pytest.importorskip("array_record.python.array_record_module").ArrayRecordReader
    more = ("--shard_size=2", "--format=arrayrecord")
    assert main(words(stage1, lines, tmp_path / "out", *more)) == 0
    assert main(words(stage1, lines, tmp_path / "npz")) == 0
    (whole,) = map(read_shard, shards(tmp_path / "npz"))
    rows = []
    for path in shards(tmp_path / "out", "arrayrecord"):
        each = reader(str(path))
        rows += [read_shard(io.BytesIO(row)) for row in each.read_all()]
        each.close()
    assert [str(row["id"]) for row in rows] == whole["id"].tolist()
    images = np.stack([row["image"] for row in rows])
    np.testing.assert_allclose(images, whole["image"], atol=1e-5, rtol=0)
    captions = [name for row in rows for name in row["caption"]]
    assert captions == whole["caption"].tolist()


def test_an_interrupted_export_is_resumed_by_whole_shards(stage1, photos, tmp_path, monkeypatch):
    arguments = words(stage1, photos, tmp_path / "out", "--shard_size=2")
    write, written = feature_files.write_shard, []

    def fail(path, arrays, file_format):
        if path.name.startswith("00001"):
            path.with_name(f"{path.name}.tmp").write_bytes(b"half of a sh")
            raise OSError("the disk is full")
        write(path, arrays, file_format)

    with monkeypatch.context() as patch:
        patch.setattr(feature_files, "write_shard", fail)
        assert main(arguments) == 1
    assert [path.name for path in shards(tmp_path / "out")] == ["00000-of-00003.npz"]
    before = os.stat(shards(tmp_path / "out")[0]).st_mtime_ns
    spy = lambda path, *each: written.append(path.name) or write(path, *each)
    monkeypatch.setattr(feature_files, "write_shard", spy)
    assert main(arguments) == 0
    assert written == ["00001-of-00003.npz", "00002-of-00003.npz"]
    assert os.stat(shards(tmp_path / "out")[0]).st_mtime_ns == before
    assert not list((tmp_path / "out").glob("*.tmp"))
    monkeypatch.setattr(feature_files, "load", lambda *each, **more: pytest.fail("loaded"))
    assert main(arguments) == 0  # nothing is left to do


def test_another_checkpoint_list_or_setting_is_refused(stage1, base, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(stage1, photos, out)) == 0
    kept = shards(out)[0].read_bytes()
    other = write_stage1(base, tmp_path / "other", features=8)
    for checkpoint, more, message in (
        (other, (), "weights was "),
        (stage1, ("--form=raw",), "form was 'normalised', now 'raw'"),
        (stage1, ("--shard_size=3",), "shard_size was 1024, now 3"),
    ):
        assert main(words(checkpoint, photos, out, *more)) == 1
        error = capsys.readouterr().err
        assert "has features of something else" in error and message in error
    Image.new("RGB", (9, 9)).save(photos / "0.png")
    assert main(words(stage1, photos, out)) == 1
    assert "images was " in capsys.readouterr().err
    assert shards(out)[0].read_bytes() == kept


def test_two_exports_do_not_write_to_one_folder(stage1, photos, tmp_path, capsys):
    """The second one would delete the shard that the first one is writing."""
    with sole_writer(tmp_path / "out"):
        assert main(words(stage1, photos, tmp_path / "out")) == 1
    assert "another process writes to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_line_about_another_image_is_another_list(stage1, photos, tmp_path, capsys):
    """Files of equal sizes and times too, as an archive or a program may make them."""
    for number, name in enumerate(("one.bmp", "other.bmp")):
        Image.new("RGB", (9, 9), (200 * number,) * 3).save(photos / name)
        os.utime(photos / name, (10**9, 10**9))
    rows = photos / "data.jsonl"
    rows.write_text('{"image": "one.bmp", "prompt": "?"}\n')
    assert main(words(stage1, rows, tmp_path / "out")) == 0
    shutil.move(photos, tmp_path / "moved")
    rows = tmp_path / "moved" / "data.jsonl"
    assert main(words(stage1, rows, tmp_path / "out")) == 0
    rows.write_text('{"image": "other.bmp", "prompt": "?"}\n')
    assert main(words(stage1, rows, tmp_path / "out")) == 1
    assert "images was " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("checkpoint", "more", "message"),
    [
        ("base", ("--form=raw",), "form: only a first stage of BLIP-2 has several forms"),
        ("stage1", ("--prompt=what?",), "prompt: a first stage of BLIP-2 reads none"),
        ("stage1", ("--shard_size=0",), "shard_size is 0, expected at least 1"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(
    request, photos, tmp_path, capsys, checkpoint, more, message
):
    folder = request.getfixturevalue(checkpoint)
    assert main(words(folder, photos, tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_picture_is_left_out(stage1, photos, tmp_path, capsys):
    (photos / "album.jpg").mkdir()
    (photos / "._0.png").write_bytes(b"of macOS")
    out = tmp_path / "out"
    out.mkdir()
    (out / "features.json.tmp").write_text("{")  # of an export that was killed at its start
    assert main(words(stage1, photos, out)) == 0
    (part,) = map(read_shard, shards(out))
    assert len(part["id"]) == 5
    (tmp_path / "file").write_text("")
    assert main(words(stage1, photos, tmp_path / "file" / "out")) == 1
    assert "file is a file; choose another folder" in capsys.readouterr().err


def test_a_shard_without_its_end_is_written_again(stage1, photos, tmp_path):
    out = tmp_path / "out"
    assert main(words(stage1, photos, out)) == 0
    whole = shards(out)[0].read_bytes()
    shards(out)[0].write_bytes(whole[:200])
    assert main(words(stage1, photos, out)) == 0
    assert len(shards(out)[0].read_bytes()) == len(whole)


def test_texts_that_cannot_be_used_are_told_with_their_line(stage1, lines, tmp_path, capsys):
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    rows[1]["answers"] = ["\ud800"]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(words(stage1, lines, tmp_path / "out")) == 1
    assert "row 1: answers[0] cannot be written as UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_list_of_images_is_said(stage1, photos, lines, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(words(stage1, tmp_path / "empty", tmp_path / "out")) == 1
    assert "has no images: expected files that end in" in capsys.readouterr().err
    row = {"images": ["0.png", "1.png"], "prompt": "a", "answer": "b"}
    lines.write_text(json.dumps(row) + "\n")
    assert main(words(stage1, lines, tmp_path / "out")) == 1
    assert "1 records do not have 1 image, such as 'data:1'" in capsys.readouterr().err
    (photos / "1.png").write_bytes(b"no image")
    assert main(words(stage1, photos, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert "1.png" in error and "finished shards stay" in error
    assert main(words(stage1, photos, photos)) == 1
    assert "exists and has no features.json" in capsys.readouterr().err
