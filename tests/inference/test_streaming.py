import numpy as np
import pytest

import jax_instructblip
from jax_instructblip.inference.streaming import pieces
from tests.micro import QUESTION
from tests.small_checkpoint import write_checkpoint


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8)


def test_a_character_of_several_tokens_is_held_back_until_it_is_whole():
    decode = lambda ids: bytes(ids).decode("utf-8", errors="replace").strip()
    text = "caf\u00e9 \U0001f600 \u6f22"
    found = list(pieces(decode, text.encode()))
    assert "".join(found) == text and len(found) == 6  # c a f e and what follows each space
    assert all("\ufffd" not in piece for piece in found)


def test_half_a_character_at_the_end_is_shown_as_it_is():
    decode = lambda ids: bytes(ids).decode("utf-8", errors="replace")
    ids = "a\u00e9".encode()[:-1]
    assert list(pieces(decode, ids)) == ["a", "\ufffd"]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_pieces_are_the_whole_text(kind, shared, tmp_path):
    """Random ids of the tokenizers whose text is known, special ones among them."""
    text = jax_instructblip.load(write_checkpoint(tmp_path / kind, kind, shared)).text
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(0, text.variant.llm.vocab - 1, rng.integers(1, 12)).tolist()
        assert "".join(pieces(text.decode, ids)) == text.decode(ids)


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "seed": 3}])
def test_streamed_text_is_the_answer(blip, settings):
    settings = {"max_new_tokens": 8, **settings}
    found = blip.stream(picture(), QUESTION, **settings)
    first = next(found)
    (expected,) = blip.generate([picture()], [QUESTION], **settings)
    assert expected.text.startswith(first) and len(first) < len(expected.text)
    assert first + "".join(found) == expected.text
    assert len(expected.logprobs) == len(expected.tokens)
    assert sum(expected.logprobs) == pytest.approx(expected.logprob, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0, expected at least"),
        ({"length_rule": "none"}, "length_rule is 'none'"),
        ({"num_beams": 2}, "num_beams is 2, but a stream has no beams"),
        ({"max_new_tokens": "8"}, "max_new_tokens is '8', expected a whole number"),
    ],
)
def test_mistakes_are_told_before_the_first_piece(blip, settings, message):
    with pytest.raises(ValueError, match=message):
        blip.stream(picture(), QUESTION, **settings)


def test_scores_that_are_not_finite_are_an_error(folder):
    broken = jax_instructblip.load(folder)
    broken.params["llm"]["head"]["kernel"] *= np.nan
    with pytest.raises(ValueError, match=r"questions \[0\] are not finite"):
        list(broken.stream(picture(), QUESTION))
