"""LLaVA's filter of caption pairs: the phrases of captions, and the captions that are chosen."""

import numpy as np
import pytest

from configs import common
from jax_instructblip import stores
from jax_instructblip.data import noun_phrases
from jax_instructblip.data.noun_phrases import balance, balanced
from jax_instructblip.data.records import Record
from jax_instructblip.training.setup import read_mixture
from tests.helpers.tars import entry, write_tar


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv(stores.VARIABLE, str(tmp_path / "copies"))


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A red car on the street.", ["red car", "street"]),
        ("the dog and the Dog", ["dog"]),
        ("state-of-the-art café, 3 cups", ["state-of-the-art café", "cups"]),
        ("of the", []),
        ("", []),
    ],
)
def test_phrases_are_the_words_between_function_words(caption, phrases):
    assert noun_phrases.noun_phrases(caption) == phrases


def test_rare_phrases_bring_nothing_and_frequent_ones_a_few():
    captions = ["a cat"] * 2 + ["a dog"] * 3 + ["a bird"] * 9 + ["a bird on a dog"] + [""]
    kept = balance(captions, cap=4, seed=1)
    assert not set(kept) & {0, 1, 15}  # the cat is too rare
    assert {2, 3, 4, 14} <= set(kept)  # the dog is in four: all of them
    birds = [index for index in kept if "bird" in captions[index]]
    assert 4 <= len(birds) <= 5  # four that were drawn, and the dog's
    np.testing.assert_array_equal(kept, balance(captions, cap=4, seed=1))
    drawn = {tuple(balance(captions, cap=4, seed=seed)) for seed in range(8)}
    assert len(drawn) > 2
    assert len(balance(captions, cap=100)) == 13 and len(balance([], cap=4)) == 0


def test_a_source_is_read_once_and_bad_pairs_are_left_out(tmp_path, caplog):
    captions = ["a dog"] * 3 + ["a cat"]
    records = [Record(str(n), (b"x",), "", (each,)) for n, each in enumerate(captions)]
    records.append(Record("bad", (b"x",), "", ("a dog",), problem="no image"))
    found, digest = balanced(records, "d", tmp_path, cap=100, seed=0)
    assert [record.id for record in found] == ["0", "1", "2"]
    assert "1 of 5 records are no pairs and left out, the first: bad: no image" in caplog.text
    again, same = balanced([None] * 5, "d", tmp_path, cap=100, seed=0)  # nothing is read again
    assert len(again) == 3 and same == digest
    assert balanced(records, "d", tmp_path, cap=100, seed=1)[1] != digest
    with pytest.raises(ValueError, match="no noun phrase is in 3 of its 1 captions"):
        balanced(records[3:4], "e", tmp_path, cap=100, seed=0)


def test_a_source_of_tars_names_the_filter(tmp_path):
    members = [entry(f"{n:03d}", "a dog" if n < 5 else f"thing{n}") for n in range(9)]
    write_tar(tmp_path / "tars" / "00000.tar", [each for part in members for each in part])
    config = common.get_config()
    with config.unlocked():
        config.data.sources.pairs = common.source(str(tmp_path / "tars"))
    whole = read_mixture(config)
    config.data.sources.pairs.noun_phrases = 100
    filtered = read_mixture(config)
    assert [len(each.sources[0].records) for each in (whole, filtered)] == [9, 5]
    assert whole.fingerprint() != filtered.fingerprint()
    assert {filtered.record(k)[1].answers for k in range(10)} == {("a dog",)}
