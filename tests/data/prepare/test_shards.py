"""Preparation of datasets: complete, resumed after a kill, without records of unusable images."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from PIL import Image

from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.images import decode
from jax_instructblip.data.prepare import builder, shards
from jax_instructblip.data.prepare.beam import prepare_with_beam
from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.records import Record
from tests.helpers.raw_layouts import write_all
from tests.helpers.toy_data import COUNT, TOY, write_raw

SIZE = 10


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "raw")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("workers", [0, 2])
def test_records_are_stored_in_order_with_their_pictures(raw, tmp_path, workers):
    folder = shards.prepare(TOY, raw, tmp_path / "out", workers=workers, shard_size=SIZE)
    found = builder.open_folder(folder, "train")
    assert [record.id for record in found] == [f"r{index}" for index in range(COUNT)]
    assert found[7].images == ((raw / "2.png").read_bytes(),)
    report = shards.read_report(folder)["splits"]
    assert [count for count, _ in report["train"]["shards"]] == [10, 10, 5]
    assert (report["train"]["expected"], report["test"]["expected"]) == (COUNT, None)
    assert {path.suffix for path in folder.iterdir()} <= {".json"} | {
        path.suffix for path in folder.glob("*.array_record*")
    }
    assert not list(folder.parent.glob("incomplete*"))


def test_a_second_run_writes_nothing(raw, tmp_path):
    folder = shards.prepare(TOY, raw, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    shutil.rmtree(raw)
    assert shards.prepare(TOY, raw, tmp_path / "out") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from jax_instructblip.data.prepare import shards
    from tests.data.prepare.test_shards import SIZE, TOY

    real = shards.write_shard

    def write_shard(path, records, frames):
        if "00001" in path.name and "train" in path.name:
            path.with_name(path.name + ".tmp").write_bytes(b"half a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, records, frames)

    shards.write_shard = write_shard
    shards.prepare(TOY, Path(sys.argv[1]), Path(sys.argv[2]), shard_size=SIZE)
"""


def test_a_killed_run_is_taken_up_and_ends_with_the_same_bytes(raw, tmp_path):
    unbroken = shards.prepare(TOY, raw, tmp_path / "unbroken", shard_size=SIZE)
    words = [sys.executable, "-c", textwrap.dedent(KILLED), str(raw), str(tmp_path / "out")]
    root = Path(__file__).parents[3]
    ended = subprocess.run(words, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert ended.returncode == -signal.SIGKILL
    (draft,) = (tmp_path / "out" / "toy").glob("incomplete.*")
    (first,) = draft.glob("toy-train.array_record-00000-of-00003")
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "toy" / shards.VERSION).exists()

    folder = shards.prepare(TOY, raw, tmp_path / "out", shard_size=SIZE)
    assert (folder / first.name).stat().st_mtime_ns == written  # that shard was not written again
    assert contents(folder) == contents(unbroken)


def test_few_missing_pictures_are_left_out_and_listed(raw, tmp_path):
    (raw / "1.png").unlink()
    (raw / "3.png").write_bytes((raw / "3.png").read_bytes()[:40])
    with pytest.raises(shards.PrepareError, match=r"of 25 records cannot be used, more") as e:
        shards.prepare(TOY, raw, tmp_path / "out", shard_size=SIZE)
    assert "r1: " in str(e.value) and "raise --max_missing" in str(e.value)

    folder = shards.prepare(TOY, raw, tmp_path / "out", shard_size=SIZE, max_missing=0.4)
    found = shards.read_report(folder)["splits"]["train"]
    assert (found["read"], found["records"], found["left_out_count"]) == (COUNT, 15, 10)
    reasons = dict(found["left_out"])
    assert "1.png" in reasons["r1"] and set(reasons) == {
        f"r{i}" for i in range(25) if i % 5 in (1, 3)
    }
    assert [record.id for record in builder.open_folder(folder, "train")][:4] == [
        *("r0", "r2", "r4", "r5")
    ]


def test_images_completed_after_a_refusal_are_taken_in(raw, tmp_path):
    picture = (raw / "1.png").read_bytes()
    (raw / "1.png").unlink()
    with pytest.raises(shards.PrepareError):
        shards.prepare(TOY, raw, tmp_path / "out", shard_size=SIZE)
    (raw / "1.png").write_bytes(picture)
    folder = shards.prepare(TOY, raw, tmp_path / "out", shard_size=SIZE)
    assert len(builder.open_folder(folder, "train")) == COUNT


def test_a_split_that_was_left_away_is_not_passed_over(raw, tmp_path):
    shards.prepare(TOY, raw, tmp_path / "out", splits=["train"])
    with pytest.raises(shards.PrepareError, match=r"prepared without test \(it has train\): rem"):
        shards.prepare(TOY, raw, tmp_path / "out", splits=["train", "test"])


def test_another_beginning_is_not_mixed_in(raw, tmp_path):
    (raw / "1.png").unlink()
    with pytest.raises(shards.PrepareError):
        shards.prepare(TOY, raw, tmp_path / "out", shard_size=SIZE)
    with pytest.raises(shards.PrepareError, match="begun with other files, splits or shard size"):
        shards.prepare(TOY, raw, tmp_path / "out", shard_size=5, max_missing=1.0)


def empty(raw, split):
    yield from ()


@pytest.mark.parametrize(
    ("changes", "settings", "error", "message"),
    [
        ({}, {"splits": ["tset"]}, shards.PrepareError, r"no splits \['tset'\]; known: \['train'"),
        ({"read": empty}, {}, AnnotationError, "toy has no record of the split 'train'"),
    ],
)
def test_refuses(raw, tmp_path, changes, settings, error, message):
    with pytest.raises(error, match=message):
        shards.prepare(dataclasses.replace(TOY, **changes), raw, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_missing_raw_folder_is_named(tmp_path):
    with pytest.raises(shards.PrepareError, match="nowhere is no folder: it should hold"):
        shards.prepare(TOY, tmp_path / "nowhere", tmp_path / "out")


def test_the_report_names_no_folder_of_this_machine(raw, tmp_path):
    folder = shards.prepare(TOY, raw, tmp_path / "out")
    for path in folder.glob("*.json"):
        assert str(tmp_path) not in json.dumps(json.loads(path.read_text())), path.name


def test_frames_of_videos_are_kept_with_their_times(shared, tmp_path):
    pytest.importorskip("av", reason="needs PyAV: pip install -e .[video]")
    names = ("realshort.mp4", "corrupted.mp4", "cockatoo.mp4")

    def read(raw, split):
        for name in names:
            yield Record(name, (str(raw / name),), "what happens?", ("a",), split=split)

    toy = dataclasses.replace(TOY, family="video QA", read=read, files={"train": ()})
    raw = shared / "data" / "videos"
    folder = shards.prepare(toy, raw, tmp_path, max_missing=0.5, frames=3)
    found = list(builder.open_folder(folder, "train"))
    assert [record.id for record in found] == ["realshort.mp4", "cockatoo.mp4"]
    for record in found:
        assert len(record.images) == 3 and list(record.times) == sorted(set(record.times))
        assert record.times[0] == 0.0
        assert len({decode(image).size for image in record.images}) == 1
    ((name, reason),) = shards.read_report(folder)["splits"]["train"]["left_out"]
    assert name == "corrupted.mp4" and reason.startswith("corrupted.mp4 cannot be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_without_room_is_named_and_the_next_run_goes_on(raw, tmp_path, workers):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))  # of any file: notes fit, shards do not
    try:
        with pytest.raises(OSError, match=r"00000-of-00003 cannot be written .*make room"):
            shards.prepare(TOY, raw, tmp_path, splits=("train",), shard_size=SIZE, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "toy").rglob("*.tmp"))
    folder = shards.prepare(TOY, raw, tmp_path, splits=("train",), shard_size=SIZE)
    assert len(builder.open_folder(folder, "train")) == COUNT


def test_records_whose_texts_cannot_be_written_are_left_out_and_listed(raw, tmp_path):
    def read(raw, split):
        for record in TOY.read(raw, split):
            answers = ("\udc00",) if record.id == "r3" else record.answers
            yield dataclasses.replace(record, answers=answers)

    toy = dataclasses.replace(TOY, read=read)
    folder = shards.prepare(toy, raw, tmp_path / "out", max_missing=0.1)
    report = shards.read_report(folder)["splits"]["train"]
    assert report["records"] == COUNT - 1
    ((name, reason),) = report["left_out"]
    assert (name, reason[:39]) == ("r3", "answers[0] cannot be written as UTF-8: ")
    assert "r3" not in {record.id for record in builder.open_folder(folder, "train")}


def toy_pictures(raw, value, size=(8, 6)):
    """Paints one picture of `raw` in another colour; the file keeps its size."""
    Image.new("RGB", size, (value, 9, 9)).save(raw / f"{value}.png")


def other_raw(tmp_path, change):
    other = write_raw(tmp_path / "other")
    change(other)
    return other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_size": 5}, "--shard_size was 10, now it is 5"),
        ({"max_missing": 0.1}, "5 of 25 records were left out, more than --max_missing 0.1 allows"),
        ({"splits": ["test"]}, r"it was prepared without test \(it has train\): remove it"),
        ({"splits": ()}, "it was prepared without test"),  # whose files are there
    ],
)
def test_what_was_prepared_with_other_options_is_not_taken(raw, tmp_path, settings, message):
    (raw / "1.png").unlink()
    usual = {"splits": ["train"], "shard_size": SIZE, "max_missing": 0.4}
    folder = shards.prepare(TOY, raw, tmp_path / "out", **usual)
    before = contents(folder)
    for _ in range(2):
        with pytest.raises(shards.PrepareError, match=f"other data than asked for:\n.*{message}"):
            shards.prepare(TOY, raw, tmp_path / "out", **(usual | settings))
    assert shards.prepare(TOY, raw, tmp_path / "out", **usual) == folder
    assert contents(folder) == before
    shutil.rmtree(folder)  # as the message says
    shards.prepare(TOY, raw, tmp_path / "out", **(usual | settings | {"max_missing": 0.4}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: toy_pictures(raw, 3), "image files of 3 times 10 records are others in RAW"),
        (lambda raw: (raw / "2.png").unlink(), "image files of 3 times 10 records are others"),
        (lambda raw: (raw / "2.png").write_bytes(b""), "image files of 3 times 10 records"),
    ],
)
def test_what_was_prepared_from_other_pictures_is_not_taken(raw, tmp_path, change, message):
    folder = shards.prepare(TOY, raw, tmp_path / "out", shard_size=SIZE)
    alike = write_raw(tmp_path / "alike")
    assert shards.prepare(TOY, alike, tmp_path / "out", shard_size=SIZE) == folder
    other = other_raw(tmp_path, change)
    with pytest.raises(shards.PrepareError, match=message):
        shards.prepare(TOY, other, tmp_path / "out", shard_size=SIZE)


@pytest.mark.parametrize("field", ["prompt", "answers", "id", "context"])
def test_what_was_prepared_from_other_annotations_is_not_taken(raw, tmp_path, field):
    shards.prepare(TOY, raw, tmp_path / "out")

    def read(raw, split):
        for record in TOY.read(raw, split):
            value = ("b",) if field == "answers" else f"{record.id} anew"
            yield dataclasses.replace(record, **{field: value})

    changed = dataclasses.replace(TOY, read=read)
    with pytest.raises(shards.PrepareError, match="train: its 25 records are of other annotatio"):
        shards.prepare(changed, raw, tmp_path / "out")


def test_other_candidates_of_all_records_are_not_taken(raw, tmp_path):
    def rank_over(*candidates):
        (raw / "candidates.txt").touch()
        fields = {
            "shared_candidates": lambda raw: candidates,
            "candidate_files": ["candidates.txt"],
        }
        return dataclasses.replace(TOY, **fields)

    folder = shards.prepare(rank_over("a", "b"), raw, tmp_path / "out")
    assert shards.prepare(rank_over("a", "b"), raw, tmp_path / "out") == folder
    for others in (("a", "c"), ("b", "a"), ()):
        with pytest.raises(shards.PrepareError, match="its 2 candidates are not the"):
            shards.prepare(rank_over(*others), raw, tmp_path / "out")


def test_other_frames_of_videos_are_not_taken(tmp_path):
    raws = write_all(tmp_path / "raw", ["msvd_qa"])
    settings = {"raw": raws["msvd_qa"], "out": tmp_path, "splits": ["test"]}
    shards.prepare(DATASETS["msvd_qa"], frames=4, **settings)
    with pytest.raises(shards.PrepareError, match="--frames was 4, now it is 2"):
        shards.prepare(DATASETS["msvd_qa"], frames=2, **settings)
    shutil.rmtree(raws["msvd_qa"])  # what it was read from need not stay
    shards.prepare(DATASETS["msvd_qa"], frames=4, **settings)
    for changed in ({"frames": 2}, {"splits": ["train"]}):
        with pytest.raises(shards.PrepareError, match=r"--frames was 4, now|without train"):
            shards.prepare(DATASETS["msvd_qa"], **({"frames": 4} | settings | changed))


def test_another_beginning_is_named_by_what_differs(raw, tmp_path):
    (raw / "1.png").unlink()
    with pytest.raises(shards.PrepareError):
        shards.prepare(TOY, raw, tmp_path / "out", splits=["train"], shard_size=SIZE)

    def read(raw, split):
        yield from (dataclasses.replace(each, prompt="why?") for each in TOY.read(raw, split))

    changed = dataclasses.replace(TOY, read=read)
    for dataset, settings, message in (
        (TOY, {"shard_size": 7}, "--shard_size was 10, now it is 7"),
        (TOY, {"splits": ["test"]}, "splits were train, now test"),
        (changed, {}, "train: other annotations"),
    ):
        usual = {"splits": ["train"], "shard_size": SIZE, "max_missing": 1.0}
        with pytest.raises(shards.PrepareError, match=message):
            shards.prepare(dataset, raw, tmp_path / "out", **(usual | settings))


def test_a_run_taken_up_writes_shards_anew_whose_pictures_changed(raw, tmp_path, monkeypatch):
    real = shards.write_shard

    def write_shard(path, records, frames):
        if "00002" in path.name:
            raise KeyboardInterrupt
        return real(path, records, frames)

    monkeypatch.setattr(shards, "write_shard", write_shard)
    settings = {"splits": ["train"], "shard_size": SIZE}
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(TOY, raw, tmp_path / "out", **settings)
    monkeypatch.undo()
    toy_pictures(raw, 4)
    folder = shards.prepare(TOY, raw, tmp_path / "out", **settings)
    found = {record.images[0] for record in builder.open_folder(folder, "train")}
    assert found == {path.read_bytes() for path in raw.glob("*.png")}
    assert contents(folder) == contents(shards.prepare(TOY, raw, tmp_path / "new", **settings))


def test_beam_takes_what_is_prepared_and_nothing_else(raw, tmp_path, monkeypatch):
    """A prepared folder is taken whoever wrote it; Beam is not asked, and need not be there."""
    for name in ("apache_beam", "apache_beam.options", "apache_beam.options.pipeline_options"):
        module = types.ModuleType(name)
        monkeypatch.setattr(module, "PipelineOptions", None, raising=False)
        monkeypatch.setitem(sys.modules, name, module)
    folder = shards.prepare(TOY, raw, tmp_path / "out", splits=["train"], shard_size=SIZE)
    settings = {"runner": "DirectRunner", "splits": ["train"]}
    assert prepare_with_beam(TOY, raw, tmp_path / "out", **settings) == folder
    with pytest.raises(shards.PrepareError, match="it was prepared without test"):
        prepare_with_beam(TOY, raw, tmp_path / "out", **(settings | {"splits": ["test"]}))
    toy_pictures(raw, 3)
    with pytest.raises(shards.PrepareError, match="image files of 3 times 10 records"):
        prepare_with_beam(TOY, raw, tmp_path / "out", **settings)
    shutil.rmtree(raw)
    assert prepare_with_beam(TOY, raw, tmp_path / "out", **settings) == folder


@pytest.mark.parametrize("picture", ["3.png", "1.png"])
def test_a_pipe_is_no_picture_and_does_not_block(raw, tmp_path, picture):
    (raw / picture).unlink()
    os.mkfifo(raw / picture)
    folder = shards.prepare(TOY, raw, tmp_path / "out", max_missing=0.3)
    left_out = shards.read_report(folder)["splits"]["train"]["left_out"]
    assert len(left_out) == 5
    assert {reason for _, reason in left_out} == {
        f"{picture}: {raw / picture} is a pipe, expected a regular file".replace(
            str(raw / picture), picture
        )
    }
