"""Batches of images and captions: the same whatever host makes them, in whatever order."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from jax_instructblip.backbones.tokenizers import make_bert
from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.loader import HOST_KEYS
from jax_instructblip.data.mixture import Mixture, Source
from jax_instructblip.data.pairs import PairBatches, image_id
from jax_instructblip.data.records import Record
from jax_instructblip.data.templates import TextStyle
from jax_instructblip.models.released import get_variant

WORDS = "a red dog and two blue birds run . ! near the old man"


@pytest.fixture(scope="module")
def text():
    bert = make_bert([WORDS])
    variant = get_variant("tiny-stage1").replace(**{"qformer.vocab": len(bert)})
    return CaptionTokenizer(variant, bert, limit=8)


def picture(value):
    return Image.fromarray(np.full((30, 40, 3), value, np.uint8))


def record(number, *captions, images=None):
    return Record(f"r{number}", images or (picture(number),), "", captions or ("a red dog",))


def batches(text, records, **settings):
    style = settings.pop("style", TextStyle())
    mixture = Mixture([Source("pairs", records, "")], 0, style=style)
    return PairBatches(mixture, text, **{"batch_size": 4, "steps": 5, **settings})


RECORDS = [record(n, f"{WORDS.split()[n]} dog", "two birds") for n in range(10)]


def test_a_batch_has_images_captions_and_the_ids_of_images(text):
    made = batches(text, RECORDS, augment=False)
    batch = made[0]
    assert batch["images"].shape == (4, 1, 56, 56, 3) and batch["images"].dtype == np.uint8
    assert batch["captions"].shape == batch["caption_mask"].shape == (4, 8)
    for row, name in enumerate(made.ids(0)):
        source = next(each for each in RECORDS if each.id == name)
        assert (batch["images"][row] == int(name[1:])).all()
        assert text.decode(batch["captions"][row]) in source.answers
        assert batch["image_id"][row] == image_id(source)
        used = batch["caption_mask"][row].sum()
        assert batch["captions"][row][used - 1] == text.tokenizer.sep_token_id
        assert batch["captions"][row][0] == text.tokenizer.cls_token_id


def test_hosts_make_the_rows_of_one_batch(text):
    whole = batches(text, RECORDS)
    for step in (0, 3):
        parts = [batches(text, RECORDS, rows=np.array(rows))[step] for rows in ([0, 1], [2, 3])]
        for name, leaf in whole[step].items():
            assert (np.concatenate([part[name] for part in parts]) == leaf).all(), name
    assert set(HOST_KEYS) < set(whole[0])
    assert whole.fingerprint() != batches(text, RECORDS, batch_size=5).fingerprint()


def test_captions_of_one_image_share_its_id_and_others_do_not():
    same = [record(3, "a"), record(3, "b")]
    assert image_id(same[0]) == image_id(same[1]) != image_id(record(4))
    for image in (b"bytes", "a/path.png"):
        first, again = (Record("x", (image,), "", ("a",)) for _ in "ab")
        assert image_id(first) == image_id(again)


def test_images_in_memory_of_equal_bytes_are_two_images():
    """Palettes differ between two of them, sides between the others."""
    flat = Image.new("P", (4, 4), 1)
    flat.putpalette([0, 0, 0, 255, 0, 0])
    blue = flat.copy()
    blue.putpalette([0, 0, 0, 0, 0, 255])
    tall, wide = Image.new("L", (2, 8), 1), Image.new("L", (8, 2), 1)
    ids = {image_id(Record("a", (each,), "", ("a",))) for each in (flat, blue, tall, wide)}
    assert len(ids) == 4


def test_long_captions_are_cut_on_the_right_and_counted(text):
    long = record(1, WORDS)
    batch = batches(text, [long, long])[0]
    assert (batch["truncated"] == [[1, 0, 0]] * 4).all() and batch["caption_mask"].all()
    exact = record(1, " ".join(WORDS.split()[:6]))
    assert not batches(text, [exact, exact])[0]["truncated"].any()


def test_the_released_text_processor_is_a_style(text):
    shouting = [record(n, 'A RED "DOG"!') for n in (1, 2)]
    batch = batches(text, shouting, style=TextStyle("lavis"))[0]
    assert {text.decode(row) for row in batch["captions"]} == {"a red dog"}
    pairs = [record(1, "a dog"), record(2, "!!!"), record(3, "two birds")]
    batch = batches(text, pairs, style=TextStyle("lavis"), batch_size=6)[0]
    assert {text.decode(row) for row in batch["captions"]} == {"a dog", "two birds"}


def test_what_cannot_be_used_is_replaced_and_counted(text, caplog):
    bad = [
        record(1, images=(b"no image",)),
        Record("none", (picture(2),), "", ()),
        record(3, images=(picture(1), picture(2))),
    ]
    made = batches(text, [*bad, record(7, "a dog"), record(8, "two birds")], batch_size=6)
    found = [made[step] for step in range(3)]
    assert sum(int(batch["replaced"].sum()) for batch in found) > 0
    assert "replaced: image of 8 bytes" in caplog.text and "it has no caption" in caplog.text
    with pytest.raises(ValueError, match="100 records of source 'pairs' in a row cannot be used"):
        _ = batches(text, bad)[0]


def test_one_pair_alone_is_refused(text):
    with pytest.raises(ValueError, match="batch_size is 1: a pair is compared with the others"):
        batches(text, RECORDS, batch_size=1)


def test_a_tokenizer_of_another_model_is_refused(text):
    with pytest.raises(ValueError, match="limit is 2, expected 3 to"):
        dataclasses.replace(text, limit=2)
    narrow = text.variant.replace(**{"qformer.vocab": 5})
    with pytest.raises(ValueError, match="it has ids up to .* the model 5 embeddings"):
        CaptionTokenizer(narrow, text.tokenizer)
    wide = text.variant.replace(**{"qformer.vocab": 999})
    with pytest.raises(ValueError, match=r"\[DEC\] is .*, the model expects its last id, 998"):
        CaptionTokenizer(wide, text.tokenizer)
