import numpy as np
import pytest

from jax_instructblip.data.batch import collate
from jax_instructblip.data.spec import IGNORE, check, example_batch, fields, shapes
from jax_instructblip.models.released import VARIANTS, get_variant
from jax_instructblip.models.variants import IMAGE_MEAN, IMAGE_STD
from tests.helpers.tiny import tiny_variant


def samples(kind, count=4):
    rng = np.random.default_rng(0)
    variant, made = tiny_variant(kind), []
    for number in range(count):
        tokens = rng.integers(3, 50, 5 + number).astype(np.int32)
        sample = {
            "images": np.full((1 + number % 2, 28, 28, 3), number, np.uint8),
            "qformer_tokens": tokens[:3],
            "tokens": tokens,
        }
        if kind == "t5":
            sample |= {"targets": tokens[:2], "decoder_tokens": tokens[:2]}
        else:
            sample["targets"] = np.where(np.arange(len(tokens)) > 2, tokens, IGNORE)
        made.append(sample)
    return variant, made


def rows(kind, shared=2):
    variant, made = samples(kind)
    visual, pad = variant.visual_tokens, variant.llm.pad_id
    return variant, collate(made, visual_tokens=visual, samples_per_row=shared, pad_id=pad)


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_what_collate_makes_is_a_batch(kind, shared):
    variant, batch = rows(kind, shared)
    check(batch, variant)
    assert list(batch) != [] and set(batch) == set(fields(variant))
    sizes = {"G": 4 // shared, "J": shared, "I": batch["images"].shape[1]}
    sizes |= {letter: batch[name].shape[-1] for letter, name in (("X", "slots"), ("A", "targets"))}
    sizes |= {"L": batch["qformer_tokens"].shape[-1], "U": batch["targets"].shape[-1]}
    expected = shapes(variant, sizes)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()} == {
        name: (shape, np.dtype(dtype)) for name, (shape, dtype) in expected.items()
    }
    answering = {name for name, field in fields(variant).items() if not field.train_only}
    prompts = {name: batch[name] for name in answering}
    if kind == "llama":  # which can be asked for every slot
        check(prompts, variant)
    else:
        with pytest.raises(ValueError, match="decoder_tokens is missing"):
            check(prompts, variant)
    assert set(shapes(variant, sizes, training=False)) == answering


@pytest.mark.parametrize("name", [n for n in VARIANTS if get_variant(n).llm is not None])
def test_an_example_batch_is_a_batch(name):
    check(example_batch(get_variant(name), batch=2, text=6, answer=3), get_variant(name))


def changed(kind, name, place, value):
    variant, batch = rows(kind)
    leaf = batch[name].copy()
    leaf[place] = value
    return variant, batch | {name: leaf}


@pytest.mark.parametrize(
    ("kind", "name", "place", "value", "reason"),
    [
        ("llama", "slots", (0, 0), 99, "row 0: slots .99. name no vector of the row, which has 21"),
        ("llama", "slots", (0, 0), 20, "row 0: places is not the inverse of slots"),
        ("llama", "slots", (0, 0), 1, "row 0: places is not the inverse of slots"),
        ("t5", "places", (1, 3), 0, "row 1: places is not the inverse of slots"),
        ("t5", "image_sample", (0, 0), 2, r"row 0: slots \[0, 1, .*show an image of another"),
        ("t5", "image_sample", (0, 0), 3, "image_sample names samples outside of 0 to 2"),
        ("llama", "segments", (0, 1), 2, "row 0: sample 1 of segments overlaps another, or has a"),
        ("llama", "segments", (1, 3), 0, "row 1: sample 1 of segments overlaps another, or has a"),
        ("t5", "decoder_segments", (0, 0), 9, "decoder_segments has samples .9. that segments has"),
        ("t5", "decoder_segments", (0, 0), 2, "sample 2 of decoder_segments overlaps another"),
        ("llama", "positions", (0, 2), 7, "row 0: sample 1 of segments has positions that do not"),
        ("llama", "tokens", (0, 7), 61, r"tokens has ids \[61\], the model's are 0 to 60"),
        ("llama", "tokens", (0, 7), -1, r"tokens has ids \[-1\]"),
        ("t5", "decoder_tokens", (0, 0), 61, r"decoder_tokens has ids \[61\]"),
        ("t5", "qformer_tokens", (0, 0, 0), 50, r"qformer_tokens has ids \[50\]"),
        ("llama", "targets", (0, 0), -7, r"targets has ids \[-7\]"),
        ("llama", "asked", (0, 0), 999, "row 0: asked has slots outside of the row"),
        ("llama", "asked", (0, 0), 10, "row 0: asked names a slot twice"),
        ("llama", "qformer_mask", (0, 0, 0), False, "qformer_mask has padding before a token"),
        ("llama", "qformer_mask", (1, 1), False, r"images in rows \[1\] have no instruction"),
    ],
)
def test_a_wrong_value_is_named(kind, name, place, value, reason):
    with pytest.raises(ValueError, match=reason):
        check(changed(kind, name, place, value)[1], tiny_variant(kind))


def test_a_target_of_padding_is_named():
    variant, made = samples("llama", 2)
    batch = collate(made, visual_tokens=variant.visual_tokens, lengths={"slots": 40})
    batch["asked"][0, 0] = 39
    with pytest.raises(ValueError, match="row 0: targets are asked of padding"):
        check(batch, variant)


def test_a_sample_longer_than_the_model_is_named():
    variant, batch = rows("llama")
    with pytest.raises(ValueError, match="row 0: sample 1 of segments has 12 slots, the model 9"):
        check(batch, variant.replace(**{"llm.max_positions": 9}))


def test_wrong_arrays_are_all_listed():
    variant, batch = rows("llama")
    for changes, reason in (
        (
            {"tokens": batch["tokens"].astype(np.int64)},
            r"tokens is int64 .*expected int32 \[G, X\]",
        ),
        ({"images": batch["images"][0]}, r"images is uint8 .*expected uint8 \[G, I, H, W, 3\]"),
        ({"images": batch["images"][..., :2]}, "images has 3 = 2, but the model has 3"),
        ({"images": np.concatenate([batch["images"]] * 2)}, "images has G = 4, but"),
        ({"segments": batch["segments"][:, :-1]}, "has X = "),
        ({"mask": batch["segments"] > 0}, "mask is no key of a batch"),
        ({"places": batch["places"][:, :-1]}, "places names 20 vectors, 3 images have 7 each"),
    ):
        with pytest.raises(ValueError, match=reason):
            check({**batch, **changes}, variant)
    with pytest.raises(ValueError) as caught:
        check({"tokens": np.zeros((2, 5), np.int64)}, variant)
    assert len(str(caught.value).splitlines()) == 10  # the summary, eight missing, one dtype


def test_one_picture_may_serve_all_rows():
    variant, made = samples("t5", 1)
    batch = collate(made * 3, visual_tokens=variant.visual_tokens)
    check({**batch, "images": batch["images"][:1]}, variant)


def normalised(pixels):
    return ((pixels / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)).astype(np.float32)


def test_floats_that_were_not_normalised_are_named():
    variant, batch = rows("t5")
    pixels = np.random.default_rng(0).integers(0, 256, batch["images"].shape, np.uint8)
    check({**batch, "images": normalised(pixels)}, variant)
    black_and_white = np.where(pixels < 128, 0, 255)
    check({**batch, "images": normalised(black_and_white)}, variant)
    wrong = {
        "from 0 to 1, as no normalised photograph is": (pixels / 255).astype(np.float32),
        "from 0 to 255": pixels.astype(np.float32),
        "from -1e[+]06 to 1e[+]06": (pixels / 127.5 - 1).astype(np.float32) * 1e6,
        "not all finite": np.where(pixels == 7, np.nan, normalised(pixels)),
    }
    for reason, images in wrong.items():
        with pytest.raises(ValueError, match=f"images are floats {reason}"):
            check({**batch, "images": images}, variant)


def test_images_that_fill_up_a_row_are_not_looked_at():
    variant, batch = rows("t5", 1)  # of one image and of two
    assert (batch["image_sample"] == 0).any()
    unused = (batch["image_sample"] == 0)[..., None, None, None]
    images = np.where(unused, 0.5, normalised(batch["images"])).astype(np.float32)
    check({**batch, "images": images}, variant)
    with pytest.raises(ValueError, match="from 0.5 to 0.5"):
        check({**batch, "images": np.full_like(images, 0.5)}, variant)


def test_a_batch_of_pairs_has_an_image_and_a_caption_a_row():
    batch = example_batch(get_variant("tiny-stage1"), 3, text=5)
    assert {name: leaf.shape for name, leaf in batch.items()} == {
        "images": (3, 1, 56, 56, 3),
        "captions": (3, 5),
        "caption_mask": (3, 5),
        "image_id": (3,),
    }
    assert batch["caption_mask"].all() and len(set(batch["image_id"])) == 3
