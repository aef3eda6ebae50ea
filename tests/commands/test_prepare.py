"""The verb `prepare`, on memes: the smallest of the original layouts."""

import json
import shutil
import sys

import pytest
from PIL import Image

from jax_instructblip.__main__ import main
from jax_instructblip.data.sources import open_records


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    (folder / "img").mkdir(parents=True)
    rows = []
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / "img" / f"{number}.png")
        row = {"id": number, "img": f"img/{number}.png", "label": number % 2, "text": "ha"}
        rows.append(json.dumps(row) + "\n")
    (folder / "train.jsonl").write_text("".join(rows))
    return folder


def words(raw, out, *more):
    return ["prepare", "hateful_memes", "--raw", str(raw), "--out", str(out), *more]


def test_prepares_and_says_what_differs_from_the_table(raw, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(raw, out, "--split", "train", "--workers", "0")) == 0
    said = capsys.readouterr().out
    assert "train: 6 records; 8500 were expected, 6 are in the annotations" in said
    records, _ = open_records(out / "hateful_memes", "train")
    assert [record.answers for record in records][:2] == [("no",), ("yes",)]
    assert records[3].context == "ha" and records[3].correct == 0
    assert "not prepared: val, test, val_unseen, test_unseen" in said


def test_missing_images_end_the_run_unless_they_are_allowed(raw, tmp_path, capsys):
    (raw / "img" / "3.png").unlink()
    chosen = ["--workers", "0"]
    assert main(words(raw, tmp_path / "out", *chosen)) == 1
    assert "3.png: No such file" in capsys.readouterr().err
    assert main(words(raw, tmp_path / "out", *chosen, "--max_missing", "0.2")) == 0
    assert "5 records, 1 left out (named in prepared.json)" in capsys.readouterr().out


def test_a_page_shows_samples_and_prepares_nothing(raw, tmp_path):
    page = tmp_path / "page.html"
    assert main(words(raw, page, "--preview")) == 0
    assert page.read_text().count("<img ") == 6
    assert not (tmp_path / "hateful_memes").exists()


def test_flags_that_nobody_knows_are_refused(raw, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(words(raw, tmp_path / "out", "--workes", "2"))
    assert "unknown flags: --workes 2" in capsys.readouterr().err


def test_without_beam_it_says_what_to_install(raw, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert main(words(raw, tmp_path / "out", "--beam_runner", "DirectRunner")) == 1
    assert "pip install -e '.[beam]'" in capsys.readouterr().err


def test_the_table_is_printed(capsys):
    assert main(["prepare", "--list"]) == 0
    said = capsys.readouterr().out
    assert "hateful_memes: image classification, held out" in said and "vqav2: image QA" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: "hatefull_memes"}, "unknown dataset 'hatefull_memes'; did you mean hateful_memes"),
        ({3: "nowhere"}, "nowhere is no folder: it should hold the files of hateful_memes"),
        ({7: "tarin"}, "has no splits ['tarin']; known: ['train'"),
        ({7: "val"}, "lacks files of split 'val': dev_seen.jsonl, or else dev.jsonl"),
    ],
)
def test_mistakes_are_one_line(raw, tmp_path, capsys, change, message):
    given = words(raw, tmp_path / "out", "--split", "train")
    for place, word in change.items():
        given[place] = word
    assert main(given) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "hateful_memes" / "1.0.0").exists()


@pytest.mark.parametrize("given", [[], ["vqav2"], ["--raw", "a", "--out", "b"]])
def test_wrong_usage_is_said(given, capsys):
    with pytest.raises(SystemExit):
        main(["prepare", *given])
    assert "expected" in capsys.readouterr().err


def other_labels(raw):
    path = raw / "train.jsonl"
    path.write_text(path.read_text().replace('"ha"', '"he"'))
    return []


@pytest.mark.parametrize(
    ("change", "message", "code"),
    [
        (lambda raw: ["--shard_size", "7"], "--shard_size was 1000, now it is 7", 1),
        (lambda raw: ["--split", "train,val"], "it was prepared without val (it has train)", 1),
        (other_labels, "train: its 6 records are of other annotations than the 6 of RAW", 1),
        (lambda raw: ["--raw", str(shutil.copytree(raw, raw.with_name("copy")))], "prepared: ", 0),
        (
            lambda raw: ["--raw", str(raw.with_name("gone"))],
            "gone is not there (any more): what",
            0,
        ),
    ],
)
def test_what_is_prepared_already_is_compared(raw, tmp_path, capsys, change, message, code):
    chosen = words(raw, tmp_path / "out", "--workers", "0")
    assert main(chosen) == 0
    if "val" in message:
        shutil.copy(raw / "train.jsonl", raw / "dev_seen.jsonl")
    capsys.readouterr()
    assert main([*chosen, *change(raw)]) == code
    said = capsys.readouterr()
    assert message in (said.err if code else said.out)
    assert code == 0 or "prepared: " not in said.out


def test_the_table_of_one_dataset(capsys):
    assert main(["prepare", "--list", "vsr"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("vsr: ") and "gqa" not in said
    assert main(["prepare", "--list", "vsrr"]) == 1
    assert "did you mean" in capsys.readouterr().err
