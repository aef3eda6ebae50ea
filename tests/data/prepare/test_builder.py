"""Records survive ArrayRecord, whole or not at all, and without TensorFlow."""

import dataclasses
import io
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from jax_instructblip.data.images import decode
from jax_instructblip.data.prepare import builder
from jax_instructblip.data.records import Record, RecordError
from jax_instructblip.data.shapes import dataset

SMALL = {"train": 12, "validation": 4, "test": 4, "test_pairs": 4, "test_families": 4}


def picture(value, mode="RGB"):
    return Image.fromarray(np.full((9, 7, 3), value, np.uint8)).convert(mode)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_records_come_back_as_they_were(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(picture(90, "CMYK"), "JPEG"))
    video = (encoded(picture(1)), encoded(picture(2)), encoded(picture(3)))
    records = [
        Record(
            "one", (video[0],), "What is “this”?\n", ("a cup", "ein Becher ☕"), task="vqa", blank=2
        ),
        Record("two", (str(path),), "Which?", ("b",), choices=("a", "b"), correct=1, split="train"),
        Record("three", video, "What happens?", (), times=(0.0, 0.5, 2.25), context="a hint"),
        Record(
            "four", (picture(200),), "", ("nothing",), ocr=("STOP", "4"), history=(("a?", "b"),)
        ),
    ]
    builder.prepare(tmp_path / "data", "mixed", {"train": lambda: records})
    found = builder.source(tmp_path / "data", "mixed", "train")
    assert len(found) == 4
    for record, back in zip(records, found, strict=True):
        assert all(isinstance(image, bytes) for image in back.images)
        for field in dataclasses.fields(Record):
            if field.name != "images":
                assert getattr(back, field.name) == getattr(record, field.name)
    assert found[0].images == records[0].images and found[2].images == video
    # Encoded bytes are kept: a CMYK file is decoded by data/images.py, not by TFDS.
    assert found[1].images == (path.read_bytes(),)
    np.testing.assert_array_equal(np.asarray(decode(found[3].images[0])), picture(200))


def test_a_source_is_random_access_and_can_be_sent_to_a_worker(tmp_path):
    found = dataset.shapes_source(tmp_path, "test", scenes=SMALL)
    again = pickle.loads(pickle.dumps(found))
    assert [again[index] for index in (5, 0, np.int64(3))] == [found[5], found[0], found[3]]
    assert found[len(found) - 1].split == "test"
    with pytest.raises(IndexError):
        found[len(found)]


def test_the_shapes_dataset_has_its_splits_and_families(tmp_path):
    for split, (_, _, families) in dataset.DATASETS["shapes"].items():
        found = dataset.shapes_source(tmp_path, split, scenes=SMALL)
        tasks = {record.task for record in found}
        assert tasks <= set(families)
        if split != "test_families":  # a scene may not allow a held-out question
            assert tasks == set(families) and len(found) == SMALL[split] * len(families)
    folders = [path.name for path in (tmp_path / builder.BUILDER).iterdir()]
    assert folders == ["shapes-12-4-4-4-4"]


def test_what_is_prepared_is_not_prepared_again(tmp_path):
    done = dataset.prepare_shapes(tmp_path, scenes=SMALL)
    before = {path: path.stat().st_mtime_ns for path in done.iterdir()}
    assert dataset.prepare_shapes(tmp_path, scenes=SMALL) == done
    assert {path: path.stat().st_mtime_ns for path in done.iterdir()} == before


def test_missing_data_and_wrong_names_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare the dataset 'shapes' first"):
        builder.source(tmp_path, "shapes", "train")
    with pytest.raises(ValueError, match="known: shapes, shapes-captions"):
        dataset.prepare_shapes(tmp_path, "shape")
    with pytest.raises(ValueError, match=r"no splits \['tests'\]"):
        dataset.prepare_shapes(tmp_path, scenes={"tests": 1})
    dataset.prepare_shapes(tmp_path, scenes=SMALL)
    with pytest.raises(ValueError, match="no split 'tests'; its splits: test, test_families"):
        dataset.shapes_source(tmp_path, "tests", scenes=SMALL)


def test_an_error_while_reading_leaves_nothing(tmp_path):
    def broken():
        yield Record("a", (encoded(picture(0)),), "Q?", ("A",))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        builder.prepare(tmp_path, "broken", {"train": broken})
    with pytest.raises(FileNotFoundError):
        builder.source(tmp_path, "broken", "train")


def test_a_killed_run_leaves_nothing_that_counts(tmp_path):
    script = """
        import os, signal, sys
        from jax_instructblip.data.prepare import builder
        from jax_instructblip.data.records import Record, RecordError
        def records():
            yield Record("a", (open(sys.argv[2], "rb").read(),), "Q?", ("A",))
            os.kill(os.getpid(), signal.SIGKILL)
        builder.prepare(sys.argv[1], "killed", {"train": records})
    """
    (tmp_path / "a.png").write_bytes(encoded(picture(7)))
    data = tmp_path / "data"
    command = [sys.executable, "-c", textwrap.dedent(script), str(data), str(tmp_path / "a.png")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = os.listdir(data / builder.BUILDER / "killed")
    assert left and "1.0.0" not in left
    records = [Record("a", (encoded(picture(7)),), "Q?", ("A",))]
    builder.prepare(data, "killed", {"train": lambda: records})
    assert sorted(os.listdir(data / builder.BUILDER / "killed")) == [".lock", "1.0.0"]
    assert list(builder.source(data, "killed", "train")) == records


def test_of_two_processes_one_writes(tmp_path):
    script = """
        import sys
        from jax_instructblip.data.shapes import dataset
        small = {name: 20 for name in dataset.DATASETS["shapes"]}
        assert len(dataset.shapes_source(sys.argv[1], "train", scenes=small)) == 160
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    runs = [subprocess.Popen(command) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    (folder,) = (tmp_path / builder.BUILDER).iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", dataset.VERSION]


def test_tensorflow_stays_out(tmp_path):
    script = """
        import sys
        from jax_instructblip.data.shapes import dataset
        small = {name: 2 for name in dataset.DATASETS["shapes"]}
        assert dataset.shapes_source(sys.argv[1], "train", scenes=small)[3].images
        assert "tensorflow" not in sys.modules and "torch" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    subprocess.run(command, check=True)


def test_what_is_prepared_with_other_splits_is_not_taken(tmp_path):
    def read():
        yield Record("one", (picture(1),), "What?", ("a",))

    folder = builder.prepare(tmp_path, "toy", {"train": read})
    assert builder.prepare(tmp_path, "toy", {"train": read}) == folder
    for splits in ({"train": read, "test": read}, {"test": read}):
        with pytest.raises(ValueError, match="has the splits train, asked for are .*test"):
            builder.prepare(tmp_path, "toy", splits)


def flip(content):
    """One bit in the middle, where a row is."""
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (flip, 1),
        (lambda content: content[: len(content) // 2], 40),
        (lambda content: b"", 40),
        (None, 40),
    ],
    ids=["flipped", "cut", "empty", "gone"],
)
def test_a_record_of_a_damaged_shard_is_named_with_its_file(tmp_path, damage, lost):
    noise = np.random.default_rng(0)
    records = [Record(f"r{i}", (noise.bytes(4000),), "what?", ("a",)) for i in range(40)]
    folder = builder.prepare(tmp_path, "toy", {"train": lambda: records})
    (shard,) = folder.glob("*.array_record*")
    if damage is None:
        shard.unlink()
    else:
        shard.write_bytes(damage(shard.read_bytes()))
    found = builder.open_folder(folder, "train")
    wrong = []
    for index, record in enumerate(records):
        try:
            assert found[index] == record
        except RecordError as error:
            assert str(error).startswith(f"{shard}: record {index} of the split cannot be read")
            assert "copy it anew" in str(error)
            wrong.append(index)
    assert len(wrong) == lost
