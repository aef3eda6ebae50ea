"""Packed training batches: the samples that they would have without packing."""

import dataclasses

import numpy as np
import pytest

from jax_instructblip.data.loader import HOST_KEYS
from jax_instructblip.data.mixture import Source
from jax_instructblip.data.records import Record
from jax_instructblip.data.spec import check
from jax_instructblip.data.train_batches import FITTING
from tests.data.test_mixture import RED, damaged, make_batches, picture, source, text

__all__ = ["text"]  # the fixture


def pictures(batch):
    return sorted(each.tobytes() for each in np.concatenate(batch["images"]))


def test_rows_of_several_samples_hold_the_same_samples(text):
    sources = [source("a", 11), source("b", 30, weight=7.0)]
    plain = make_batches(text, sources, batch_size=8)
    for shared in (2, 4, 8):
        packed = make_batches(text, sources, batch_size=8, samples_per_row=shared)
        for step in range(3):
            assert packed.ids(step) == plain.ids(step)
            one, other = plain[step], packed[step]
            assert other["images"].shape[:2] == (8 // shared, shared)
            assert len(other["replaced"]) == len(other["truncated"]) == 8
            assert other["tokens"].shape[1] % 64 == 0
            assert pictures(one) == pictures(other)
            learned = lambda batch: sorted(batch["targets"][batch["targets"] >= 0].tolist())
            assert learned(one) == learned(other)
            check({k: v for k, v in other.items() if k not in HOST_KEYS}, text.variant)
    assert packed.fingerprint() == plain.fingerprint()


def test_hosts_share_a_batch_of_packed_rows(text):
    sources = [source("a", 11), damaged("b", 30, bad=[2, 5, 9, 11])]
    settings = dict(batch_size=8, samples_per_row=2, augment=False)
    whole = [make_batches(text, sources, **settings)[step] for step in range(3)]
    assert sum(int((batch["replaced"] > 0).sum()) for batch in whole)
    for hosts in (2, 4):
        for host in range(hosts):
            rows = np.arange(4)[host::hosts]
            part = make_batches(text, sources, **settings, rows=rows)
            for step, batch in enumerate(whole):
                for key, value in part[step].items():
                    every = batch[key].reshape(4, -1, *value.shape[1:])[rows]
                    np.testing.assert_array_equal(value.reshape(every.shape), every, err_msg=key)


def test_a_replacement_is_the_same_however_samples_share_rows(text):
    """And it fits the room of the sample in whose place it stands."""
    rng, words = np.random.default_rng(0), "what color is this image number one two".split()
    mixed = []
    for i in range(40):
        image, prompt = picture(i) if i % 3 else b"x", " ".join(words[: rng.integers(1, 9)])
        mixed.append(Record(f"r{i}", (image,), prompt, ("red",)))
    found = {}
    for shared in (1, 2, 4):
        settings = dict(batch_size=4, samples_per_row=shared, augment=False)
        batches = make_batches(text, [Source("a", mixed, "")], **settings)
        found[shared] = [
            (sorted(batch["replaced"]), pictures(batch))
            for batch in (batches[step] for step in range(6))
        ]
    assert found[1] == found[2] == found[4]
    assert any(replaced[-1] > 0 for replaced, _ in found[1])


def test_where_no_other_is_as_short_one_is_cut(text):
    prompt = "what color is this image number one two?"
    long = [Record(f"l{i}", (RED,), prompt, ("red",)) for i in range(9)]
    short = Record("d", (b"x",), "what?", ("red",))
    batches = make_batches(text, [Source("a", [*long, short], "")], batch_size=1, steps=10)
    step = next(step for step in range(10) if batches.ids(step) == ["d"])
    batch = batches[step]
    assert batch["replaced"][0] > FITTING
    expected = text.example("what?", "red")
    used = (batch["segments"][0] > 0).sum() - text.variant.visual_tokens
    assert used == len(expected["tokens"]) and batch["truncated"][0].any()


def test_a_sample_longer_than_the_model_is_replaced(text):
    if text.variant.llm.encoder_decoder:
        pytest.skip("its positions are relative")
    few = 7 + 8  # an image, and a short text
    variant = text.variant.replace(**{"llm.max_positions": few})
    cut = dataclasses.replace(text, variant=variant)
    long = Record("long", (RED,), "what color is this image number one two?", ("red",))
    short = Record("short", (RED,), "what?", ("red",))
    batch = make_batches(cut, [Source("a", [long, short], "")], batch_size=2)[0]
    assert sorted(batch["replaced"] > 0) == [False, True]
    assert (batch["segments"] > 0).sum(axis=1).max() <= few


def test_samples_that_do_not_fill_rows_are_refused(text):
    with pytest.raises(ValueError, match="3 samples a row do not divide a batch of 4"):
        make_batches(text, [source("a", 5)], samples_per_row=3)
