"""Captions of a first stage through its retriever: batches, settings, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jax_instructblip
from jax_instructblip.backbones.stage1 import write_stage1
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.retrieval import Retriever
from tests.helpers.interpreter import run_python
from tests.helpers.tiny import COLORS, write_base

PHOTOS = [Image.new("RGB", (40, 30), color) for color in COLORS.values()]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    write_stage1(write_base(folder / "base", "t5"), folder / "stage1", features=12)
    return jax_instructblip.load(folder / "stage1")


def test_a_caption_depends_on_its_image_alone(blip):
    together = blip.generate(PHOTOS, max_new_tokens=5)
    for photo, caption in zip(PHOTOS, together, strict=True):
        (alone,) = blip.generate([photo], max_new_tokens=5)
        assert alone.tokens == caption.tokens and len(caption.tokens) <= 5
        assert alone.logprob == pytest.approx(caption.logprob, abs=1e-5)
        assert caption.text == blip.text.decode(caption.tokens)
    uneven = blip.generate(PHOTOS[:3], batch_size=2, max_new_tokens=5)
    assert [each.tokens for each in uneven] == [each.tokens for each in together[:3]]


def test_settings_are_those_of_answers(blip):
    (caption,) = blip.generate(
        PHOTOS[:1], num_beams=3, num_return_sequences=2, max_new_tokens=4, min_new_tokens=4
    )
    assert len(caption.tokens) == 4 and len(caption.alternatives) == 1
    config = GenerationConfig(num_beams=3, max_new_tokens=4)
    (same,) = blip.generate(PHOTOS[:1], config, min_new_tokens=4)
    assert same.tokens == caption.tokens
    one = blip.generate(PHOTOS[:1] * 2, temperature=5.0, seed=1, max_new_tokens=8)
    again = blip.generate(PHOTOS[:1] * 2, temperature=5.0, seed=1, max_new_tokens=8, batch_size=1)
    assert [each.tokens for each in one] == [each.tokens for each in again]
    assert one[0].tokens != one[1].tokens


def test_two_devices_caption_as_one_does(blip):
    code = f"""
    import jax_instructblip, numpy as np
    from jax_instructblip.parallel.mesh import make_mesh
    blip = jax_instructblip.load({str(blip.source.folder)!r}, mesh=make_mesh(2))
    images = list(np.full((3, 30, 40, 3), np.arange(3)[:, None, None, None] * 90, np.uint8))
    print([each.tokens for each in blip.generate(images, num_beams=2, max_new_tokens=3)])
    """
    images = list(np.full((3, 30, 40, 3), np.arange(3)[:, None, None, None] * 90, np.uint8))
    alone = blip.generate(images, num_beams=2, max_new_tokens=3)
    assert run_python(code, devices=2).splitlines()[-1] == str([each.tokens for each in alone])


def test_what_cannot_be_captioned(blip):
    with pytest.raises(ValueError, match="there are no images: give at least one"):
        blip.generate([])
    for one in (PHOTOS[0], "a.jpg", Path("a.jpg"), b"a", None, np.zeros((9, 9, 3), np.uint8)):
        for call in (blip.generate, blip.image_features, lambda each: blip.itm(each, ["a"])):
            with pytest.raises(ValueError, match=r"images is a \w+, expected a list of them"):
                call(one)
    positions = blip.variant.qformer.max_positions
    with pytest.raises(ValueError, match=f"max_new_tokens is {positions + 1}, expected"):
        blip.generate(PHOTOS, max_new_tokens=positions + 1)
    with pytest.raises(ValueError, match="max_tokens"):
        blip.generate(PHOTOS, max_tokens=3)
    mute = blip.variant.replace(**{"qformer.caption_head": False})
    params = {**blip.params, "heads": {k: blip.params["heads"][k] for k in ("match",)}}
    with pytest.raises(ValueError, match=r"no caption head(.|\n)*blip2_pretrained\.pth"):
        Retriever(mute, params, blip.text).generate(PHOTOS)
