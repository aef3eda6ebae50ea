import collections
import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image

from jax_instructblip.checkpoint import read_config
from jax_instructblip.data.images import decode, resize_squash
from jax_instructblip.data.mixture import Mixture, Source
from jax_instructblip.data.prepare import builder
from jax_instructblip.data.records import Record
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.data.train_batches import ATTEMPTS, TrainBatches
from jax_instructblip.models.variants import Variant
from tests.helpers.tiny import write_base

RED = Image.new("RGB", (40, 30), (200, 10, 10))


def picture(index):
    """Different in every record, and no plain color, so that crops and mirrors show."""
    pixels = np.random.default_rng(index).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def records(name, count, image=picture):
    return [
        Record(f"{name}{index}", (image(index),), f"what color is {name}?", ("red",))
        for index in range(count)
    ]


def source(name, count, weight=0.0, **fields):
    return Source(name, records(name, count, **fields), digest=name, weight=weight)


@pytest.fixture(scope="module", params=["llama", "t5"])
def text(request, tmp_path_factory):
    folder = write_base(tmp_path_factory.mktemp("mixture") / "base", request.param)
    variant = Variant.from_dict(read_config(folder)["variant"])
    limits = {"qformer_limit": 24, "prompt_limit": 24, "answer_limit": 8}
    return TextProcessor.load(folder, variant, **limits)


def make_batches(text, sources, batch_size=4, steps=10, seed=0, **settings):
    return TrainBatches(
        Mixture(sources, seed), text, batch_size=batch_size, steps=steps, **settings
    )


def ids(mixture, count):
    return [mixture.record(place)[1].id for place in range(count)]


# The order


def test_the_order_is_a_function_of_the_seed_and_the_place():
    sources = [source("a", 20), source("b", 50)]
    first, again, other = (Mixture(sources, seed) for seed in (0, 0, 1))
    assert ids(first, 60) == ids(again, 60) != ids(other, 60)
    assert first.record(37)[1] is again.record(37)[1]  # any place, without those before


def test_every_record_comes_once_an_epoch_in_another_order():
    mixture = Mixture([source("a", 20)], 0)
    order = ids(mixture, 60)
    epochs = [order[start : start + 20] for start in (0, 20, 40)]
    for epoch in epochs:
        assert len(set(epoch)) == 20
    assert epochs[0] != epochs[1] != epochs[2]


def test_another_source_does_not_change_the_order_within_one():
    alone = ids(Mixture([source("a", 30)], 0), 30)
    beside = ids(Mixture([source("b", 30), source("a", 30)], 0), 60)
    assert [name for name in beside if name.startswith("a")] == alone


def shares(names):
    counts = collections.Counter(name[0] for name in names)
    return {name: count / len(names) for name, count in counts.items()}


def test_shares_are_square_roots_of_sizes_unless_a_weight_is_given():
    mixture = Mixture([source("a", 100), source("b", 900), source("c", 400)], 0)
    assert mixture.shares == pytest.approx([1 / 6, 3 / 6, 2 / 6])
    assert shares(ids(mixture, 600)) == pytest.approx(
        {"a": 1 / 6, "b": 3 / 6, "c": 2 / 6}, abs=0.01
    )
    weighted = Mixture([source("a", 100, weight=30.0), source("b", 900)], 0)
    assert weighted.shares == pytest.approx([0.5, 0.5])
    table = weighted.table().splitlines()
    assert table[1].split() == ["a", "100", "50.00%", "(weight", "30)"]
    assert table[2].split() == ["b", "900", "50.00%"]


@pytest.mark.parametrize(
    ("sampling", "expected"), [("uniform", [0.5, 0.5]), ("proportional", [0.1, 0.9])]
)
def test_other_sampling_rules(sampling, expected):
    sources = [source("a", 100), source("b", 900)]
    assert Mixture(sources, 0, sampling=sampling).shares == pytest.approx(expected)


def test_the_fingerprint_is_of_seed_sources_content_and_shares(text):
    def fingerprint(seed=0, digest="x", weight=0.0, batch_size=4, count=5):
        made = Source("a", records("a", count), digest=digest, weight=weight)
        sources = [made, source("b", 10)]
        return make_batches(text, sources, batch_size=batch_size, seed=seed).fingerprint()

    different = [
        fingerprint(),
        fingerprint(seed=1),
        fingerprint(digest="y"),
        fingerprint(weight=9.0),
        fingerprint(batch_size=8),
        fingerprint(count=6),
    ]
    assert len(set(different)) == len(different)
    assert fingerprint() == fingerprint()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "at least one"),
        (["a", "a"], "different names"),
    ],
)
def test_refuses_mixtures(sources, message):
    with pytest.raises(ValueError, match=message):
        Mixture([source(name, 3) for name in sources], 0)


def test_refuses_unknown_rules():
    with pytest.raises(ValueError, match="sampling is 'root', expected one of sqrt, uniform"):
        Mixture([source("a", 3)], 0, sampling="root")
    with pytest.raises(ValueError, match="instructions is 'none', expected one of templates, pl"):
        Mixture([source("a", 3)], 0, instructions="none")


def test_refuses_sources():
    with pytest.raises(ValueError, match="it has no records; weight is -1"):
        Source("a", [], digest="", weight=-1.0)
    with pytest.raises(ValueError, match="templates is 'captions', expected one of caption"):
        Source("a", records("a", 1), digest="", templates="captions")


# Prompt and answer


@pytest.mark.parametrize(
    ("instructions", "kind", "expected"),
    [
        ("plain", "question", ("what is it?", "red")),
        ("plain", "question_generation", ("red", "what is it?")),
        ("tag", "question", ("[image question answering:vqav2] what is it?", "red")),
        ("tag", "question_generation", ("[image question answering:vqav2] red", "what is it?")),
    ],
)
def test_the_ablations_have_no_template(instructions, kind, expected):
    record = Record("a", (RED,), "what is it?", ("red",))
    made = Source("vqav2", [record], "", templates=kind, family="image question answering")
    mixture = Mixture([made], 0, instructions=instructions)
    assert mixture.instruct(made, record, np.random.default_rng(0)) == expected


# Batches


def same(one, two):
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


def test_batches_hold_the_samples_of_their_number(text):
    batches = make_batches(text, [source("a", 7), source("b", 9)])
    assert len(batches) == 10
    assert batches.ids(3) == ids(batches.mixture, 16)[12:16]
    batch = batches[3]
    assert batch["images"].shape == (4, 1, 28, 28, 3)
    same(batch, make_batches(text, [source("a", 7), source("b", 9)])[3])  # no memory of others


def test_hosts_share_a_batch(text):
    sources = [source("a", 11), source("b", 30, weight=7.0)]
    whole = make_batches(text, sources, batch_size=8, buckets=(12, 16, 20))[2]
    for hosts in (2, 4):
        parts = [
            make_batches(
                text, sources, batch_size=8, buckets=(12, 16, 20), rows=np.arange(8)[host::hosts]
            )[2]
            for host in range(hosts)
        ]
        for key in whole:
            merged = np.empty_like(whole[key])
            for host, part in enumerate(parts):
                merged[host::hosts] = part[key]
            np.testing.assert_array_equal(merged, whole[key], err_msg=key)


def test_every_host_sees_the_same_mixture():
    """Every host's rows over many batches: not one source for one host, as slicing would give."""
    mixture = Mixture([source("a", 100), source("b", 100)], 0)
    batch, hosts = 8, 4
    names = ids(mixture, 800)
    for host in range(hosts):
        rows = range(host * batch // hosts, (host + 1) * batch // hosts)
        mine = [names[step * batch + row] for step in range(100) for row in rows]
        assert shares(mine) == pytest.approx({"a": 0.5, "b": 0.5}, abs=0.05)


def test_rows_are_padded_to_a_bucket_that_fits_the_global_batch(text):
    long, short = "what color is this image number one two?", "what?"
    mixed = [Record(str(i), (RED,), long if i % 5 == 0 else short, ("red",)) for i in range(40)]
    batches = make_batches(text, [Source("a", mixed, "")], buckets=(4, 8), batch_size=3)
    half = make_batches(
        text, [Source("a", mixed, "")], buckets=(4, 8), batch_size=3, rows=np.array([1])
    )
    shapes = set()
    for step in range(10):
        batch = batches[step]
        longest = int(batch["qformer_mask"].sum(axis=-1).max())
        expected = next(size for size in (4, 8, 24) if size >= longest)
        assert batch["qformer_tokens"].shape[-1] == expected
        assert half[step]["qformer_tokens"].shape[-1] == expected
        assert half[step]["tokens"].shape[1] == batch["tokens"].shape[1]
        shapes.add(batch["qformer_tokens"].shape[-1])
    assert len(shapes) > 1


def test_without_buckets_there_is_one_shape(text):
    batch = make_batches(text, [source("a", 5)])[0]
    assert batch["qformer_tokens"].shape[-1] == 24
    visual = text.variant.visual_tokens
    assert batch["tokens"].shape[1] == visual + (24 if text.variant.llm.encoder_decoder else 31)


# Pixels


def test_without_augmentation_the_whole_image_is_squashed(text):
    batches = make_batches(text, [source("a", 5)], augment=False)
    record = batches.mixture.record(0)[1]
    expected = resize_squash(decode(record.images[0]), 28)
    np.testing.assert_array_equal(batches[0]["images"][0, 0], expected)


def test_augmentation_is_a_function_of_seed_and_place(text):
    one = [source("a", 1)]
    batch = make_batches(text, one, batch_size=6)[0]["images"]
    assert len({image.tobytes() for image in batch}) == 6  # the same record, six times
    np.testing.assert_array_equal(batch, make_batches(text, one, batch_size=6)[0]["images"])
    assert (batch != make_batches(text, one, batch_size=6, seed=1)[0]["images"]).any()
    moved = make_batches(text, one, batch_size=3)[1]["images"]
    np.testing.assert_array_equal(batch[3:], moved)  # place 3 is place 3 in any batch size


def test_frames_of_a_video_are_cropped_alike(text):
    video = [Record("v", (picture(0), picture(0)), "what?", ("red",))]
    frames = make_batches(text, [Source("a", video, "")], batch_size=1)[0]["images"][0]
    np.testing.assert_array_equal(frames[0], frames[1])


# Damage


def damaged(name, count, bad):
    good = records(name, count)
    for index in bad:
        good[index] = Record(f"{name}{index}", (b"no image",), "what color is it?", ("red",))
    return Source(name, good, "")


def test_a_damaged_row_is_replaced_and_counted(text, caplog):
    sources = [damaged("a", 12, bad=[3, 7])]
    clean = make_batches(text, [source("a", 12)], augment=False)
    batches = make_batches(text, sources, augment=False)
    replaced = 0
    for step in range(3):
        names = batches.ids(step)
        batch = batches[step]
        for row, name in enumerate(names):
            assert (batch["replaced"][row] > 0) == (name in ("a3", "a7"))
            if not batch["replaced"][row]:
                np.testing.assert_array_equal(batch["images"][row], clean[step]["images"][row])
        replaced += (batch["replaced"] > 0).sum()
        same(batch, make_batches(text, sources, augment=False)[step])
        host = make_batches(text, sources, augment=False, rows=np.array([1, 3]))[step]
        same({key: value[[1, 3]] for key, value in batch.items()}, host)
    assert replaced == 2
    assert "a3: replaced: image of 8 bytes" in caplog.text


def test_a_row_of_a_damaged_shard_is_replaced_and_counted(text, tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3)).astype(np.uint8)
    rows = [Record(f"r{i}", (Image.fromarray(noise),), "what?", ("red",)) for i in range(16)]
    folder = builder.prepare(tmp_path, "toy", {"train": lambda: rows})
    (shard,) = folder.glob("*.array_record*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    batches = make_batches(text, [Source("toy", builder.open_folder(folder, "train"), "")])
    assert sum(int((batches[step]["replaced"] > 0).sum()) for step in range(4)) == 1
    assert "of toy: replaced: " in caplog.text and str(shard) in caplog.text


def test_a_row_whose_text_cannot_be_used_is_replaced(text):
    bad = Record("bad", (RED,), "an <image> in the text", ("red",))
    good = Record("good", (RED,), "what color?", ("red",))
    batch = make_batches(text, [Source("a", [bad, good], "")], batch_size=2)[0]
    assert sorted(batch["replaced"] > 0) == [False, True]
    np.testing.assert_array_equal(batch["tokens"][0], batch["tokens"][1])


def test_a_replacement_fits_the_shape_of_the_batch(text):
    """The hosts agreed on it before any image was opened."""
    long = [
        Record(f"l{i}", (RED,), "what color is this image number one two?", ("red",))
        for i in range(30)
    ]
    short = [Record("s", (RED,), "what?", ("red",)), Record("d", (b"x",), "what?", ("red",))]
    batches = make_batches(
        text, [Source("a", [*long, *short], "")], batch_size=1, steps=32, buckets=(4,)
    )
    step = next(step for step in range(32) if batches.ids(step) == ["d"])
    batch = batches[step]
    assert batch["qformer_tokens"].shape[-1] == 4
    assert batch["replaced"][0] > 0


def test_a_replacement_with_more_images_is_cut(text):
    many = [Record(f"m{i}", (RED,) * 3, "what?", ("red",)) for i in range(60)]
    batches = make_batches(
        text, [Source("a", [*many, Record("d", (b"x",), "what?", ("red",))], "")], 1, steps=61
    )
    step = next(step for step in range(61) if batches.ids(step) == ["d"])
    batch = batches[step]
    assert batch["replaced"][0] > 0
    assert batch["images"].shape[1] == 1 and batch["image_sample"].tolist() == [[1]]


def test_nothing_but_damage_stops_the_run(text):
    batches = make_batches(text, [damaged("a", 3, bad=[0, 1, 2])])
    with pytest.raises(ValueError, match=rf"{ATTEMPTS} records of source 'a' in a row .*check"):
        batches[0]


def test_can_be_sent_to_worker_processes(text):
    batches = make_batches(text, [source("a", 5)])
    same(pickle.loads(pickle.dumps(batches))[1], batches[1])


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "what \ud800"},
        {"answers": ("\udc00",)},
        {"id": "\udc80"},
        {"context": "\ud800"},
        {"images": ("\ud800.png",)},
        {"prompt": "x " * 5_000_000},
    ],
)
def test_a_row_whose_text_cannot_be_written_is_replaced_and_counted(text, fields):
    good = Record("good", (RED,), "what color?", ("red",))
    bad = dataclasses.replace(good, **{"id": "bad", **fields})
    batch = make_batches(text, [Source("a", [bad, good], "")], batch_size=2)[0]
    assert sorted(batch["replaced"] > 0) == [False, True]
    np.testing.assert_array_equal(batch["tokens"][0], batch["tokens"][1])
