"""A first stage where a model that answers is wanted, and as what it loads."""

import numpy as np
import pytest
from PIL import Image

import jax_instructblip
from jax_instructblip.__main__ import main
from jax_instructblip.backbones.stage1 import write_stage1
from jax_instructblip.inference.retrieval import ABSENT, Retriever
from jax_instructblip.parallel.mesh import make_mesh
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
        ["check", "DATA", "--checkpoint", "HERE"],
        ["generate", "--checkpoint", "HERE", "--image", "IMAGE", "--prompt", "a"],
        ["rank", "--checkpoint", "HERE", "--image", "IMAGE", "--prompt", "a", "--candidates", "b"],
        ["evaluate", "--checkpoint", "HERE", "--data", "DATA", "--out", "OUT", "--split", "test"],
        ["evaluate", "--checkpoint", "HERE", "--datasets", "gqa", "--data", "OUT", "--out", "OUT"],
    ],
    ids=" ".join,
)
def test_a_verb_that_asks_says_that_it_answers_nothing(files, words, tmp_path, capsys):
    here, data = files
    names = {"HERE": here, "DATA": data, "IMAGE": data.parent / "0.png", "OUT": tmp_path}
    assert main([str(names.get(word, word)) for word in words]) == 1
    error = capsys.readouterr().err
    assert "is a first stage of BLIP-2" in error and error.count("\n") == 1


def test_plans_are_of_other_models(files, capsys):
    words = ["plan", "--config", "configs/shapes_stage1.py", "--topology", "cpu:1"]
    assert main([*words, f"--config.model.checkpoint={files[0]}"]) == 1
    assert "not of BLIP-2's first stage" in capsys.readouterr().err


def test_it_loads_as_a_retriever_of_one_device(files):
    blip = jax_instructblip.load(files[0])
    assert isinstance(blip, Retriever) and "Retriever(a first-stage model" in repr(blip)
    with pytest.raises(ValueError, match="works on one device: leave out mesh"):
        jax_instructblip.load(files[0], mesh=make_mesh())


def test_a_ranking_of_few_is_whole_and_what_is_not_ranked_is_marked(files):
    blip = jax_instructblip.load(files[0])
    blip.silent = True
    images = [Image.fromarray(np.full((30, 30, 3), value, np.uint8)) for value in (0, 90, 250)]
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
