import numpy as np
import pytest
from transformers import T5Tokenizer

import jax_instructblip
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.streaming import pieces
from jax_instructblip.models.released import VARIANTS
from tests.helpers.small_checkpoint import write_checkpoint
from tests.helpers.tiny import QUESTION, spoil_logits


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


REWRITTEN = "he do n't know , what 's it ? We 're here ! It ' s a ' b ' . I 'm ' n't 've"


@pytest.mark.parametrize("cleans", [False, True])
def test_pieces_are_the_whole_text_also_where_it_is_rewritten(cleans, shared):
    """`clean_up_tokenization_spaces` takes away spaces that stand in a text already."""
    tokenizer = T5Tokenizer.from_pretrained(
        shared / "data" / "tokenizers" / "t5", clean_up_tokenization_spaces=cleans
    )
    text = object.__new__(TextProcessor)
    object.__setattr__(text, "llm", tokenizer)
    object.__setattr__(text, "variant", VARIANTS["instructblip-flan-t5-xl"])
    assert text.rewrites == cleans
    ids = tokenizer(REWRITTEN).input_ids
    assert ("don't know, what's it?" in text.decode(ids)) == cleans
    vocabulary = sorted(set(ids))
    rng = np.random.default_rng(0)
    given = [ids, *(rng.choice(vocabulary, rng.integers(1, 14)).tolist() for _ in range(200))]
    given += [rng.integers(0, 32_000, 9).tolist() for _ in range(50)]
    for row in given:
        found = list(pieces(text.decode, row, rewrites=text.rewrites))
        assert "".join(found) == text.decode(row)
    assert len(list(pieces(text.decode, ids, rewrites=text.rewrites))) > 10


def test_a_decoder_of_the_folder_is_not_trusted():
    found = list(pieces(lambda ids: "".join(map(chr, ids)), b"to be or not", rewrites=True))
    assert found == ["to", " be", " or", " not"]


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "seed": 3}])
def test_streamed_text_is_the_answer(blip, settings):
    settings = {"max_new_tokens": 8, **settings}
    found = blip.stream(picture(), QUESTION, **settings)
    first = next(found)
    (expected,) = blip.generate([picture()], [QUESTION], **settings)
    assert expected.text.startswith(first)
    assert len(first) < len(expected.text) or blip.text.rewrites  # which holds back a last word
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
    spoil_logits(broken.params["llm"], np.nan)
    with pytest.raises(ValueError, match=r"questions \[0\] are not finite"):
        list(broken.stream(picture(), QUESTION))


def test_the_beginning_of_a_stop_is_held_back_until_it_is_none():
    """The stop is a text, which `decode` cuts off."""

    def decode(ids):
        return bytes(ids).decode().partition("###")[0].strip()

    for text, parts in {
        "a #b ##c": ["a", " #b", " ##c"],
        "a\n###": ["a"],
        "ab ##": ["a", "b", " ##"],
        "###": [],
        "# ###": ["#"],
    }.items():
        for rewrites in (False, True):
            found = list(pieces(decode, text.encode(), rewrites=rewrites, stop="###"))
            assert "".join(found) == decode(text.encode())
            assert rewrites or found == parts
