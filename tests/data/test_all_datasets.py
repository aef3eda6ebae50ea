"""All 26 datasets: from raw folders to one mixture and its batches."""

import collections
import dataclasses
import functools
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import common, paper
from jax_instructblip.checkpoint import read_config
from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.loader import HOST_KEYS, load
from jax_instructblip.data.mixture import Mixture, Source
from jax_instructblip.data.prepare import builder, shards
from jax_instructblip.data.records import Record
from jax_instructblip.data.spec import check
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.data.train_batches import TrainBatches
from jax_instructblip.models.variants import Variant
from jax_instructblip.parallel.mesh import batch_sharding, make_mesh
from jax_instructblip.training.setup import read_batches, read_mixture
from tests.helpers.raw_layouts import FRAMES, LAYOUTS, write_all
from tests.helpers.tiny import write_base

HELD_OUT = tuple(name for name, dataset in DATASETS.items() if not dataset.held_in)
VIDEOS = ("msvd_qa", "msrvtt_qa", "ivqa")
BATCH, STEPS = 8, 6
RESUMED = int(np.random.default_rng(0).integers(1, STEPS))

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    return functools.cache(lambda name: write_all(folder, [name])[name])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def prepared(raw, data):
    """`prepared(names)` prepares these, as a user would, and returns the folder of them all."""

    @functools.cache
    def prepare_one(name):
        return shards.prepare(DATASETS[name], raw(name), data)

    def prepared(names):
        for name in names:
            assert prepare_one(name) == data / name / shards.VERSION
        return data

    return prepared


def configure(data, names, **fields):
    """The paper's configuration, with these datasets."""
    config = paper.get_config("small", BATCH, samples_per_row=1, row=(0, 0), sample=())
    config.train.steps = STEPS
    with config.unlocked():
        config.data.sources = ConfigDict(
            {
                name: common.source(
                    f"{data}/{name}", LAYOUTS[name].split, templates=DATASETS[name].templates
                )
                for name in names
            }
        )
    config.data.update(fields)
    return config


# Prepared


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_is_prepared_and_opened_again(name, raw, prepared):
    split, count, _ = LAYOUTS[name]
    folder = prepared([name]) / name / shards.VERSION
    read = list(DATASETS[name].read(raw(name), split))
    stored = list(builder.open_folder(folder, split))
    assert len(read) == len(stored) == count
    for before, after in zip(read, stored, strict=True):
        if name in VIDEOS:
            assert after.times == (0.0, 0.5, 1.0, 1.5)  # of FRAMES, four a second
            assert len(set(after.images)) == 4
        else:
            assert after.images == (Path(before.images[0]).read_bytes(),)
        assert dataclasses.replace(after, images=before.images, times=()) == before
    report = shards.read_report(folder)
    assert report["name"] == name
    for found in report["splits"].values():
        assert (found["left_out_count"], found["records"]) == (0, found["read"])


def test_the_layouts_are_of_all_datasets_and_of_different_sizes():
    assert set(LAYOUTS) == set(DATASETS)
    assert len({layout.count for layout in LAYOUTS.values()}) == len(DATASETS) == 26
    assert FRAMES == 8


# For some datasets the number of a record, and its fields.
STORED = {
    "coco_caption": (1, {"id": "9:1", "answers": ("A café’s meal",)}),
    "textcaps": (
        0,
        {
            "id": "0000000000000000:0",
            "answers": ("A NOKIA phone lies on a table.",),
            "ocr": ("NOKIA", "7{a}"),
        },
    ),
    "aokvqa": (
        0,
        {
            "id": "q0",
            "prompt": "What is in the motorcyclist's mouth?",
            "answers": ("cigarette",) * 9,
            "choices": ("toothpick", "food", "cigarette"),
            "correct": 2,
            "blank": 1,
        },
    ),
    "scienceqa": (
        0,
        {
            "id": "4",
            "prompt": "Which is farthest north?",
            "answers": ("Oslo",),
            "choices": ("Oslo", "Rome"),
            "correct": 0,
            "context": "See the map.",
        },
    ),
    "ivqa": (
        0,
        {
            "id": "v-0_10_20",
            "prompt": "What, in the end, is put into the pan?",
            "answers": ("salt", "salt", "sugar", "a pinch of salt"),
            "blank": 1,
        },
    ),
    "visual_dialog": (
        2,
        {
            "id": "239030:3",
            "prompt": "is it a 1",
            "answers": ("no",),
            "choices": ("no", "two", "i can't tell", "black and silver", "yes"),
            "correct": 0,
            "context": "a tablet in a dock",
            "history": (("what color is the tablet", "black and silver"), ("is it a 0", "yes")),
        },
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_stored_records_by_value(name, prepared):
    index, fields = STORED[name]
    split = LAYOUTS[name].split
    record = builder.open_folder(prepared([name]) / name / shards.VERSION, split)[index]
    fields = {"prompt": "", "images": record.images, "times": record.times} | fields
    assert record == Record(**fields, task=name, split=split)


# Mixed


def test_held_out_datasets_are_named_all_of_them(prepared):
    with pytest.raises(ValueError, match="some sources cannot be used") as error:
        read_mixture(configure(prepared(DATASETS), DATASETS))
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == len(HELD_OUT) == 13
    for line, name in zip(lines, sorted(HELD_OUT), strict=True):
        assert line.strip().startswith(f"config.data.sources.{name}: {name} is held out")


def test_draws_of_all_26_follow_the_weights(prepared):
    mixture = read_mixture(configure(prepared(DATASETS), DATASETS, allow_held_out=HELD_OUT))
    names = [source.name for source in mixture.sources]
    assert names == sorted(DATASETS)
    roots = np.sqrt([LAYOUTS[name].count for name in names])
    np.testing.assert_allclose(mixture.shares, roots / roots.sum())
    # Grain's choice of sources alone: its shuffle takes a millisecond in sets as small as these.
    chosen = mixture._order._selection_map
    counts = np.bincount([chosen[place][0] for place in range(100_000)], minlength=26)
    assert counts.sum() == 100_000
    np.testing.assert_allclose(counts / 100_000, mixture.shares, rtol=0.01, atol=0)
    seen = collections.Counter()
    for place in range(200):
        source, record = mixture.record(place)
        # The task of a record of NoCaps names its domain, too.
        assert source.name == names[chosen[place][0]] == record.task.partition("/")[0]
        assert source.family == DATASETS[source.name].family
        seen[source.name] += 1
    assert set(seen) == set(DATASETS)


def test_images_and_videos_share_a_batch(prepared, bases):
    """Rows with fewer images get black ones that nothing sees."""
    names = ("gqa", "coco_caption", "ivqa")
    batches = make_batches(bases("t5"), prepared(names), names)
    frames = set()
    for step in range(STEPS):
        batch = batches[step]
        check({k: v for k, v in batch.items() if k not in HOST_KEYS}, batches.text.variant)
        assert batch["images"].shape[1] == batch["image_sample"].sum(axis=1).max()
        for row, owners in enumerate(batch["image_sample"]):
            used = int(owners.sum())
            assert not batch["images"][row, used:].any() and batch["images"][row, :used].any()
            assert (batch["slots"][row] >= 0).sum() == used * batches.text.variant.visual_tokens
            frames.add(used)
    assert frames == {1, 4}


def test_hosts_agree_on_the_images_of_a_row(bases):
    """The rows of all hosts are looked at: a host with pictures alone has the videos' shape."""
    picture = Image.new("RGB", (8, 8))
    records = [Record("still", (picture,), "what?", ("a",))]
    records += [Record("clip", (picture, picture), "what?", ("a",))]
    variant = Variant.from_dict(read_config(bases("t5"))["variant"])
    text = TextProcessor.load(bases("t5"), variant)
    mixture = Mixture([Source("mine", records, "")], 0)
    for rows in ([0], [1]):
        sizes = dict(batch_size=2, steps=1, buckets=(64,))
        batches = TrainBatches(mixture, text, **sizes, rows=np.array(rows))
        assert batches[0]["images"].shape[1] == 2


def test_videos_alone_make_batches_of_frames(prepared, bases):
    batch = make_batches(bases("t5"), prepared(VIDEOS), VIDEOS)[RESUMED]
    assert batch["images"].shape == (BATCH, 4, 28, 28, 3)


# Batches of the 13 that the paper trains on


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return functools.cache(lambda kind: write_base(folder / kind, kind))


def make_batches(base, data, names=tuple(paper.HELD_IN), rows=None):
    config = configure(data, names, allow_held_out=HELD_OUT)
    variant = Variant.from_dict(read_config(base)["variant"])
    start = types.SimpleNamespace(folder=base, variant=variant, input_format=InputFormat())
    rows = np.arange(BATCH) if rows is None else rows
    return read_batches(config, read_mixture(config), start, rows)


def test_the_configuration_of_the_paper_is_the_mixture_of_the_table(prepared):
    data = prepared(paper.HELD_IN)
    config = paper.get_config("small", BATCH, samples_per_row=1, row=(0, 0), sample=())
    for name, source in config.data.sources.items():
        assert source.path == f"data/{name}"
        source.path = f"{data}/{name}"
    ours = read_mixture(configure(data, [n for n, d in DATASETS.items() if d.held_in]))
    assert read_mixture(config).fingerprint() == ours.fingerprint()


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_hosts_and_resumed_runs_make_the_same_batches(kind, prepared, bases):
    base, data = bases(kind), prepared(paper.HELD_IN)
    batches = make_batches(base, data)
    whole = [batches[step] for step in range(STEPS)]
    for batch in whole:
        assert batch["images"].shape == (BATCH, 1, 28, 28, 3)
        assert not batch["replaced"].any()
        check({k: v for k, v in batch.items() if k not in HOST_KEYS}, batches.text.variant)
    sources = {batches.mixture.record(place)[0].name for place in range(BATCH * STEPS)}
    assert sources == set(paper.HELD_IN)
    for hosts in (1, 2, 4):
        rows = np.split(np.arange(BATCH), hosts)
        for first in (0, RESUMED):  # a run of its own: nothing is left of the one before
            parts = [make_batches(base, data, rows=mine) for mine in rows]
            for step in range(first, STEPS):
                made = [part[step] for part in parts]
                for key, value in whole[step].items():
                    together = np.concatenate([batch[key] for batch in made])
                    assert together.dtype == value.dtype
                    np.testing.assert_array_equal(together, value, err_msg=f"{key} {hosts} {step}")


def test_the_loader_resumes_with_the_same_batches(prepared, bases):
    batches = make_batches(bases("llama"), prepared(paper.HELD_IN))
    loaded = list(load(batches, batch_sharding(make_mesh()), start=RESUMED))
    assert len(loaded) == STEPS - RESUMED
    for step, (batch, counts) in enumerate(loaded, start=RESUMED):
        for key, value in batches[step].items():
            found = (counts if key in HOST_KEYS else batch)[key]
            np.testing.assert_array_equal(found, value, err_msg=f"{key} {step}")


WORKERS = """
    if __name__ == "__main__":  # the workers import this file: nothing that they do not need
        import sys
        from pathlib import Path
        from unittest import mock
        import numpy as np
        from jax_instructblip.data import loader
        from jax_instructblip.data.batch import sample_sizes, slot_counts
        from tests.data.test_all_datasets import BATCH, make_batches

        base, data, expected, start = *map(Path, sys.argv[1:4]), int(sys.argv[4])
        expected = np.load(expected)
        # As the second of two hosts, which has no global array of its own.
        mock.patch.object(loader, "put", lambda batch, *rest: batch).start()
        rows = np.split(np.arange(BATCH), 2)[1]
        batches = make_batches(base, data, rows=rows)
        step = start
        for batch, counts in loader.load(batches, None, start=start, workers=4):
            np.testing.assert_array_equal(counts.pop("text"), slot_counts(batch))
            np.testing.assert_array_equal(counts.pop("sizes"), sample_sizes(batch))
            assert counts.pop("row").tolist() == [batch[n].shape[1] for n in ("slots", "targets")]
            for key, value in (batch | counts).items():
                np.testing.assert_array_equal(value, expected[f"{step} {key}"][rows], err_msg=key)
            step += 1
        assert step == len(batches) > start
        print("same")
"""


def test_worker_processes_make_the_same_batches(prepared, bases, tmp_path):
    base, data = bases("t5"), prepared(paper.HELD_IN)
    batches = make_batches(base, data)
    values = {f"{n} {k}": v for n in range(STEPS) for k, v in batches[n].items()}
    np.savez(tmp_path / "expected.npz", **values)
    script = tmp_path / "workers.py"  # a file: the workers import it
    script.write_text(textwrap.dedent(WORKERS))
    words = [script, base, data, tmp_path / "expected.npz", RESUMED]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout.endswith("same\n"), done.stderr
