"""Retrieval with a first stage: loading, features, rankings; verbs that need answers refuse it."""

import json

import numpy as np
import pytest
from PIL import Image

import jax_instructblip
from jax_instructblip.__main__ import main
from jax_instructblip.backbones.stage1 import write_stage1
from jax_instructblip.inference.feature_forms import FORMS
from jax_instructblip.inference.retrieval import ABSENT, Retriever
from tests.helpers.interpreter import run_python
from tests.helpers.tiny import write_base, write_data


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    base = write_base(folder / "base", "llama")
    write_stage1(base, folder / "stage1", features=12)
    return folder / "stage1", write_data(folder / "data", count=4)


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "gqa", "--raw=.", "--preview", "--out", "OUT", "--checkpoint", "HERE"],
        ["generate", "--checkpoint", "HERE", "--image", "IMAGE", "--prompt", "a"],
        ["rank", "--checkpoint", "HERE", "--image", "IMAGE", "--prompt", "a", "--candidates", "b"],
        ["evaluate", "--checkpoint", "HERE", "--data", "DATA", "--out", "OUT", "--split", "test"],
        ["evaluate", "--checkpoint", "HERE", "--datasets", "gqa", "--data", "OUT", "--out", "OUT"],
    ],
    ids=" ".join,
)
def test_verbs_that_need_answers_refuse_a_first_stage(files, words, tmp_path, capsys):
    here, data = files
    names = {"HERE": here, "DATA": data, "IMAGE": data.parent / "0.png", "OUT": tmp_path}
    assert main([str(names.get(word, word)) for word in words]) == 1
    error = capsys.readouterr().err
    assert "is a first stage of BLIP-2" in error and error.count("\n") == 1


def test_answers_of_a_first_stage_are_not_planned(files, capsys):
    words = ["plan", "--config", "configs/shapes_stage1.py", "--topology", "cpu:1"]
    assert main([*words, "--step", "decode", f"--config.model.checkpoint={files[0]}"]) == 1
    assert "its step is train, found decode" in capsys.readouterr().err


def test_it_loads_as_a_retriever(files):
    blip = jax_instructblip.load(files[0])
    assert isinstance(blip, Retriever) and "Retriever(a first-stage model" in repr(blip)
    small = jax_instructblip.load(files[0], quantise="int8")
    assert ", float32, int8 weights, " in repr(small) and ", float32, /" in repr(blip)


def test_what_only_the_other_kind_of_model_has_is_said(files):
    first, answers = (jax_instructblip.load(each) for each in (files[0], files[0].parent / "base"))
    with pytest.raises(AttributeError, match="'itc': it has answer, .*, stream.* a Retriever"):
        answers.itc([], [])
    with pytest.raises(AttributeError, match="no 'stream': it has generate, .*, rank.* answers"):
        first.stream([], [])
    assert not hasattr(answers, "_repr_html_") and not hasattr(first, "_repr_html_")


@pytest.fixture(scope="module")
def blip(files):
    blip = jax_instructblip.load(files[0])
    blip.silent = True
    return blip


def picture(value):
    return Image.fromarray(np.full((30, 30, 3), value, np.uint8))


def test_a_ranking_of_few_is_whole_and_what_is_not_ranked_is_marked(blip):
    images = [picture(value) for value in (0, 90, 250)]
    texts = ["red", "green", "blue", "what color is it"]
    whole, near = blip.rank(images, texts, k=99), blip.itc(images, texts)
    assert (whole.image_to_text != ABSENT).all() and whole.text_to_image.shape == (4, 3)
    two = blip.rank(images, texts, k=2)
    kept = two.image_to_text != ABSENT
    assert (kept.sum(axis=1) == 2).all()
    for row in range(3):
        assert set(np.flatnonzero(kept[row])) == set(np.argsort(-near[row], kind="stable")[:2])
    np.testing.assert_allclose(
        two.image_to_text[kept], whole.image_to_text[kept], atol=1e-5, rtol=0
    )


def test_features_come_in_three_forms(blip):
    images, texts = [picture(0), picture(200), picture(90)], ["red", "what color is it"]
    c = blip.variant.qformer
    shapes = {form: blip.image_features(images, form=form).shape for form in FORMS}
    wide, narrow = (3, c.queries, c.width), (3, c.queries, c.feature_width)
    assert shapes == {"raw": wide, "projected": narrow, "normalised": narrow}
    projected = blip.image_features(images, form="projected")
    normalised = blip.image_features(images)
    lengths = np.linalg.norm(projected, axis=-1, keepdims=True)
    assert abs(lengths - 1).min() > 1e-3  # or nothing would tell the two apart
    np.testing.assert_allclose(projected / lengths, normalised, atol=1e-6, rtol=0)
    of_texts = {form: blip.text_features(texts, form=form) for form in FORMS}
    assert of_texts["raw"].shape == (2, c.width)
    lengths = np.linalg.norm(of_texts["projected"], axis=-1, keepdims=True)
    np.testing.assert_allclose(of_texts["projected"] / lengths, of_texts["normalised"], atol=1e-6)
    assert blip.pair_features(images[:2], texts).shape == (2, c.queries, c.width)
    with pytest.raises(ValueError, match="form is 'normal', expected one of raw, projected"):
        blip.image_features(images, form="normal")


def test_one_image_and_one_text(blip):
    ranking = blip.rank([picture(90)], ["red"], k=5)
    near, match = blip.itc([picture(90)], ["red"]), blip.itm([picture(90)], ["red"])
    assert ranking.image_to_text.shape == ranking.text_to_image.shape == (1, 1)
    np.testing.assert_allclose(ranking.image_to_text, near + match[:, 1:], atol=1e-5, rtol=0)


def test_of_images_that_are_all_alike_the_first_are_taken(blip):
    images, texts = [picture(90)] * 5, ["red", "green", "blue"]
    ranking = blip.rank(images, texts, k=2)
    assert ((ranking.text_to_image != ABSENT) == [True, True, False, False, False]).all()
    kept = ranking.text_to_image[:, :2]
    np.testing.assert_allclose(kept[:, 0], kept[:, 1], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        ([picture(0)], [], "captions is \\[\\], expected a list of at least one text"),
        ([], ["red"], "there are no images: give at least one"),
        ("photo.jpg", ["red"], "images is a str, expected a list of them"),
        ([picture(0)], "red", "captions is 'red', expected a list"),
        ([picture(0)], ["red", " \n"], "caption 1 is blank"),
    ],
)
def test_nothing_to_compare_is_said(blip, images, texts, message):
    for call in (blip.itc, blip.rank):
        with pytest.raises(ValueError, match=message):
            call(images, texts)


def test_the_keys_of_an_image_are_computed_once_for_all_blocks(blip, monkeypatch):
    """One pass over each image, whatever the number of its texts; the pairs then skip the tower."""
    seen, run = [], blip._image_kv
    monkeypatch.setattr(blip, "_image_kv", lambda *each: seen.append(len(each[1])) or run(*each))
    images, texts = [picture(v) for v in range(0, 180, 10)], ["red", "green", "blue"] * 4
    few = blip.rank(images, texts, k=12, batch_size=2)
    assert seen == [16, 16]  # 18 images
    whole = blip.rank(images, texts, k=12, batch_size=128)
    np.testing.assert_allclose(few.image_to_text, whole.image_to_text, atol=1e-5, rtol=0)
    pairs = blip.itm([images[17]] * 12, texts)[:, 1]
    near = blip.itc(images, texts)
    np.testing.assert_allclose(whole.image_to_text[17], pairs + near[17], atol=1e-5, rtol=0)


@pytest.mark.full
def test_several_devices_give_what_one_gives(files):
    code = f"""
    import json, jax, numpy as np
    from jax.sharding import NamedSharding
    import jax_instructblip
    from jax_instructblip.parallel.mesh import make_mesh
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 255, (7, 30, 30, 3)).astype(np.uint8))
    texts = ["red", "green", "blue", "what color is it", "white"]
    results = []
    for sizes in (None, (4, 1, 1), (2, 2, 1), (1, 2, 2)):
        mesh = None if sizes is None else make_mesh(*sizes)
        blip = jax_instructblip.load({str(files[0])!r}, mesh=mesh)
        blip.silent = True
        near, run = [], blip._near
        blip._near = lambda *each: near.append(run(*each)) or near[-1]
        results.append([
            blip.image_features(images), blip.text_features(texts), blip.itc(images, texts),
            blip.itm(images[:5], texts), *blip.rank(images, texts, k=3),
        ])
        if sizes is not None:
            parts = sizes[0] * sizes[1]
            shards = near[0].addressable_shards
            assert len(shards) == 4 and shards[0].data.shape[0] == near[0].shape[0] // parts
    gaps = [max(abs(a - b).max() for a, b in zip(results[0], each)) for each in results[1:]]
    print(json.dumps([float(gap) for gap in gaps]))
    """
    gaps = json.loads(run_python(code, devices=4).splitlines()[-1])
    assert len(gaps) == 3 and max(gaps) < 1e-5
