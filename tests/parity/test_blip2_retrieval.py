"""Retrieval beside the original's values, and beside transformers."""

import jax
import numpy as np
import pytest
from PIL import Image

import jax_instructblip
from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.inference.retrieval import ABSENT, Retriever
from jax_instructblip.models.blip2 import Blip2
from tests.conversion.test_export import assert_same_tensors, load_in_transformers
from tests.helpers import golden, golden_blip2
from tests.helpers.golden_blip2 import assert_close

LIMIT = 1e-4
ITM = "Blip2ForImageTextRetrieval"


@pytest.fixture(scope="module")
def found(shared):
    return golden.outputs(golden_blip2.CASE)


@pytest.fixture(scope="module")
def given(shared):
    with np.load(golden.GOLDEN / golden_blip2.CASE / "inputs.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def blip(shared, tmp_path_factory):
    variant = golden_blip2.variant()
    text = CaptionTokenizer.load(golden.GOLDEN / "tokenizers" / "bert", variant)
    params = golden_blip2.params(tmp_path_factory.mktemp("original"))
    made = Retriever(variant, params, text, silent=True)
    made._pixels = lambda images: np.stack(images)  # recorded ones are normalised already
    return made


@pytest.fixture(scope="module")
def images(shared):
    return list(golden.images()[:, 0])


def test_captions_are_read_as_by_the_original(blip, given):
    texts = [str(each) for each in given["text_input"]]
    short = CaptionTokenizer(blip.variant, blip.text.tokenizer, given["text_ids"].shape[1])
    ids, valid, cut = short.encode(texts)
    assert not cut.any()
    assert (ids == given["text_ids"]).all() and (valid == (given["text_mask"] > 0)).all()
    assert short.decode(ids[2]) == "some birds"


def test_features_scores_and_ranking_are_the_originals(blip, found, given, images):
    texts = [str(each) for each in given["text_input"]]
    features = blip.image_features(images)
    assert_close(features, found["extract_features/image/image_embeds_proj"], LIMIT)
    of_texts = blip.text_features(texts)
    assert_close(of_texts, found["extract_features/text/text_embeds_proj"][:, 0], LIMIT)
    raw = blip.image_features(images, form="raw")
    assert_close(raw, found["extract_features/image/image_embeds"], LIMIT)
    raw = blip.text_features(texts, form="raw")
    assert_close(raw, found["extract_features/text/text_embeds"][:, 0], LIMIT)
    both = blip.pair_features(images, texts)
    assert_close(both, found["extract_features/multimodal/multimodal_embeds"], LIMIT)
    assert_close(blip.itm(images, texts)[:, 1], found["compute_itm"], LIMIT)
    for number in range(3):
        pair = images[number : number + 1], texts[number : number + 1]
        assert_close(blip.itc(*pair), found[f"blip2_itm/itc/{number}"], LIMIT)
        assert_close(blip.itm(*pair), found[f"blip2_itm/itm_logits/{number}"], LIMIT)
    ranking = blip.rank(images, texts, k=2)
    assert_close(ranking.image_to_text, found["compute_sim_matrix_k2/score_i2t"], LIMIT)
    assert_close(ranking.text_to_image, found["compute_sim_matrix_k2/score_t2i"], LIMIT)
    alone = blip.rank(images, texts, k=2, itm_only=True)
    near = blip.itc(images, texts)
    kept = ranking.image_to_text != ABSENT
    assert_close(alone.image_to_text[kept], ranking.image_to_text[kept] - near[kept], 1e-5)


def test_neither_batches_nor_neighbours_change_a_score(blip, given, images, monkeypatch):
    texts = [str(each) for each in given["text_input"]] * 3
    whole = blip.rank(images, texts, k=9)
    for size in (1, 2, 4):
        parts = blip.rank(images, texts, k=9, batch_size=size)
        assert_close(parts.image_to_text, whole.image_to_text, 1e-5)
        assert_close(blip.text_features(texts, batch_size=size), blip.text_features(texts), 1e-6)
    assert_close(whole.image_to_text, whole.text_to_image.T, 1e-6)


def test_an_images_keys_are_made_once_for_all_its_texts(blip):
    """Products of a match grow with the texts, those of the patches' keys and values do not."""
    c, vision = blip.variant.qformer, blip.variant.vision
    patches = jax.ShapeDtypeStruct((1, vision.tokens, vision.width), np.float32)

    def keys(count):
        ids = jax.ShapeDtypeStruct((count, 8), np.int32)
        valid = jax.ShapeDtypeStruct((count, 8), np.bool_)
        apply = lambda p, i, v: Blip2(blip.variant).apply(
            {"params": blip.params}, p, i, v, method=Blip2.match_logits
        )
        text = str(jax.make_jaxpr(apply)(patches, ids, valid))
        shape = f"f32[1,{vision.tokens},{c.heads},{c.width // c.heads}]"
        return text.count(shape), f"f32[{count},{vision.tokens}" in text

    assert keys(4)[0] == keys(8)[0] > 0 and not keys(4)[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda blip, images: blip.itc(images, []), "captions is .*at least one text"),
        (lambda blip, images: blip.itc([], ["a"]), "there are no images"),
        (lambda blip, images: blip.itc(images, [3]), "caption 0 is no text"),
        (lambda blip, images: blip.itm(images, ["a"]), "3 images and 1 texts"),
        (lambda blip, images: blip.rank(images, ["a"], k=0), "k is 0, expected at least 1"),
        (lambda blip, images: blip.rank(images, ["a"], k=2.5), "k is 2.5, expected a whole"),
        (lambda blip, images: blip.rank(images, ["a"], batch_size=0), "batch_size is 0"),
    ],
)
def test_what_cannot_be_compared_is_said(blip, images, call, message):
    with pytest.raises(ValueError, match=message):
        call(blip, images)


@pytest.fixture(scope="module")
def folder(forge):
    return forge("blip2-itm-vit-g")


def test_scores_of_a_folder_are_those_of_transformers(folder, tmp_path):
    import torch

    theirs = load_in_transformers(folder, ITM)
    blip = jax_instructblip.load(folder)
    assert isinstance(blip, Retriever) and not blip.variant.qformer.caption_head
    rng, size = np.random.default_rng(0), blip.variant.vision.image_size
    images = [
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8).astype(np.uint8)) for _ in "abc"
    ]
    texts = ["a red dog", "birds", "the old man holds a ball on the street"]
    ids, valid, _ = blip.text.encode(texts)
    shown = golden_blip2.normalised(blip._pixels(images))
    assert shown.shape == (3, 3, size, size)
    with torch.no_grad():
        given = {
            "pixel_values": torch.tensor(shown),
            "input_ids": torch.tensor(ids).long(),
            "attention_mask": torch.tensor(valid).long(),
        }
        match = theirs(**given, use_image_text_matching_head=True).logits_per_image
        near = theirs(**given, use_image_text_matching_head=False).logits_per_image
    assert_close(blip.itm(images, texts), match.numpy(), LIMIT)
    assert_close(blip.itc(images, texts), near.numpy(), LIMIT)


def test_there_and_back_no_bit_changes(folder, tmp_path):
    ours = jax_instructblip.convert(folder, tmp_path / "ours")
    back = jax_instructblip.export(ours, tmp_path / "back")
    assert_same_tensors(back, folder)
    load_in_transformers(back, ITM)
    texts = ["a red dog", "birds"]
    first, again = (jax_instructblip.load(each).text_features(texts) for each in (folder, ours))
    assert (first == again).all()
