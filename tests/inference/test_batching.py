import numpy as np
import pytest
from PIL import Image

from jax_instructblip.inference.batching import images_by_place, pair_inputs


def test_a_single_picture_or_prompt_needs_no_list(tmp_path):
    image = Image.new("RGB", (4, 4))
    for single in (image, np.zeros((4, 4, 3), np.uint8), b"bytes", "a.png", tmp_path / "a.png"):
        (question,) = pair_inputs(single, "what?")
        assert question.prompt == "what?" and question.frames == (single,)
    assert [each.prompt for each in pair_inputs(image, ["a", "b"])] == ["a", "b"]
    assert len(pair_inputs([image] * 3, "a")) == 3


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (([], ["a"]), "images is empty"),
        ((["a"], []), "prompts is empty"),
        ((["a"] * 2, ["a"] * 3), "2 images and 3 prompts do not match"),
        ((3, ["a"]), "images is a int, expected a list of them, or a single one"),
        ((["a.jpg"], {"a"}), "prompts is a set, expected a list of them, or a single one"),
        ((["a", ["b", "c"]], ["a"]), r"same number of frames .* in order, \[1, 2\]"),
        (([[]], ["a"]), r"at least one; found, in order, \[0\]"),
        (([["a"] * 1025], ["a"]), "a video has 1025 frames, at most 1024 are read"),
        ((["a"], ["a", None, 3]), r"prompts must be strings; those at \[1, 2\] are not"),
        ((["a"], ["a", "<image> b"]), "prompt 1 has an <image>, but this model has no chat"),
    ],
)
def test_pair_refuses(inputs, message):
    with pytest.raises(ValueError, match=message):
        pair_inputs(*inputs)


ONE, TWO, NONE = "<image> a?", "is <image> like <image>?", "what?"


@pytest.mark.parametrize(
    ("images", "prompts", "expected"),
    [
        ("abc", [NONE, ONE, NONE], ["a", "b", "c"]),  # as `pair_inputs` pairs them
        ("abc", [ONE], ["a", "b", "c"]),
        ("a", [ONE, NONE], ["a"]),
        ("ab", [TWO], [["a", "b"]]),
        ("abcd", [TWO, TWO], [["a", "b"], ["c", "d"]]),
        ("abcd", [NONE, TWO, ONE], [["a"], ["b", "c"], ["d"]]),
        ("ab", [TWO, TWO, TWO], [["a", "b"]]),  # which serve all prompts
    ],
)
def test_each_place_has_an_image(images, prompts, expected):
    assert images_by_place(list(images), prompts) == expected


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        ("abc", [TWO], r"3 images and 2 <image> in the prompts do not match \(in each: 2\)"),
        ("a", [TWO], "1 images and 2 <image>"),
        ("abc", [TWO, NONE, ONE], r"3 images and 3 <image> .* \(in each: 2, 0, 1\)"),
        ("ab", [TWO, ONE], "2 images and 3 <image>"),
    ],
)
def test_other_numbers_of_images_and_places_are_refused(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        images_by_place(list(images), prompts)
