import numpy as np
import pytest

from jax_instructblip.data.batch import (
    IGNORE,
    bucket,
    collate,
    pad_to,
    text_positions,
    validate_batch,
)


def ids(*values):
    return np.array(values, np.int32)


def example(tokens, targets, qformer=(101, 102), decoder=None, frames=1):
    made = {
        "images": np.full((frames, 2, 2, 3), tokens[0], np.uint8),
        "qformer_tokens": ids(*qformer),
        "tokens": ids(*tokens),
        "targets": ids(*targets),
        "truncated": ids(0, 1, 0),
    }
    if decoder is not None:
        made["decoder_tokens"] = ids(*decoder)
    return made


LLAMA = [
    example([2, 5, 6, 7, 2], [-100, 6, 7, 2, -100]),
    example([2, 8, 2], [-100, 2, -100], qformer=(101, 9, 9, 102)),
]
T5 = [
    example([5, 6, 1], [7, 8, 9, 1], decoder=[0, 7, 8, 9]),
    example([5, 6, 6, 6, 1], [7, 1], decoder=[0, 7]),
]


def test_llama_batch_is_as_drawn():
    batch = collate(LLAMA, pad_id=32000)
    validate_batch(batch, training=True)
    np.testing.assert_array_equal(batch["tokens"], [[2, 5, 6, 7, 2], [2, 8, 2, 32000, 32000]])
    np.testing.assert_array_equal(batch["mask"], [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(
        batch["targets"], [[-100, 6, 7, 2, -100], [-100, 2, -100, -100, -100]]
    )
    np.testing.assert_array_equal(batch["qformer_tokens"], [[101, 102, 0, 0], [101, 9, 9, 102]])
    np.testing.assert_array_equal(batch["qformer_mask"], [[1, 1, 0, 0], [1, 1, 1, 1]])
    assert batch["images"].shape == (2, 1, 2, 2, 3) and batch["images"].dtype == np.uint8
    np.testing.assert_array_equal(batch["truncated"], [[0, 1, 0]] * 2)


def test_t5_batch_pads_answers_by_themselves():
    batch = collate(T5)
    validate_batch(batch, training=True)
    np.testing.assert_array_equal(batch["targets"], [[7, 8, 9, 1], [7, 1, -100, -100]])
    np.testing.assert_array_equal(batch["decoder_tokens"], [[0, 7, 8, 9], [0, 7, 0, 0]])
    assert batch["tokens"].shape == (2, 5)


def test_positions_that_hold_a_token_are_counted():
    llama = collate([example([1, 2, 3], [IGNORE, 3, 9]), example([1], [9])])
    assert text_positions(llama).tolist() == [3 + 1 + 2 + 2, 6 + 4]
    t5 = collate([example([1, 2, 3], [7, 9], decoder=[0, 7]), example([1], [9], decoder=[0])])
    assert text_positions(t5).tolist() == [3 + 1 + 2 + 2 + 2 + 1, 6 + 4 + 4]


def test_buckets_take_the_smallest_that_fits():
    lengths = {"tokens": (16, 4, 8), "qformer_tokens": 6}
    batch = collate(LLAMA, lengths=lengths)
    assert batch["tokens"].shape == batch["mask"].shape == batch["targets"].shape == (2, 8)
    assert batch["qformer_tokens"].shape == batch["qformer_mask"].shape == (2, 6)
    assert not batch["mask"][:, 5:].any()
    batch = collate(T5, lengths={"tokens": 8, "targets": (4, 8)})
    assert batch["targets"].shape == batch["decoder_tokens"].shape == (2, 4)
    assert batch["tokens"].shape == (2, 8)
    assert [bucket(n, (4, 8), "tokens") for n in (1, 4, 5, 8)] == [4, 4, 8, 8]
    assert bucket(0, None, "tokens") == 1


def test_row_that_fits_no_bucket_names_length_and_field():
    with pytest.raises(ValueError, match=r"tokens has a row of 5 tokens.*\[2, 4\].*raise lengths"):
        collate(LLAMA, lengths={"tokens": (4, 2)})
    with pytest.raises(ValueError, match=r"qformer_tokens has a row of 4 tokens"):
        collate(LLAMA, lengths={"qformer_tokens": 3})
    with pytest.raises(ValueError, match=r"targets has a row of 4 tokens"):
        collate(T5, lengths={"targets": 3})
    with pytest.raises(ValueError, match=r"unknown keys \['token'\]"):
        collate(LLAMA, lengths={"token": 3})


def test_examples_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="no examples"):
        collate([])
    with pytest.raises(ValueError, match="example 1 has the keys"):
        collate([LLAMA[0], T5[0]])
    with pytest.raises(ValueError, match=r"images of one batch.*\(1, 2, 2, 3\), \(4, 2, 2, 3\)"):
        collate([LLAMA[0], example([2], [2], frames=4)])
    with pytest.raises(ValueError, match="unknown key 'text'"):
        collate([LLAMA[0] | {"text": ids(1)}])
    with pytest.raises(ValueError, match=r"row 0 has shape \(1, 2\)"):
        pad_to([np.zeros((1, 2), np.int32)], 4, 0)


def test_batch_for_answering_has_no_targets():
    prompts = [{k: e[k] for k in ("images", "tokens", "qformer_tokens")} for e in LLAMA]
    batch = collate(prompts)
    validate_batch(batch)
    with pytest.raises(ValueError, match="targets is missing"):
        validate_batch(batch, training=True)


def broken(**changes):
    return collate(LLAMA) | changes


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (broken(images=np.zeros((2, 1, 2, 2, 3), np.float32)), "images is float32"),
        (broken(images=np.zeros((2, 2, 2, 3), np.uint8)), "expected uint8 of 5 dimensions"),
        (broken(images=np.zeros((2, 1, 2, 2, 4), np.uint8)), r"expected \[B, F, H, W, 3\]"),
        (broken(images=np.zeros((3, 1, 2, 2, 3), np.uint8)), "tokens has 2 rows, images has 3"),
        (broken(tokens=np.zeros((2, 5), np.int64)), "tokens is int64"),
        (broken(mask=np.ones((2, 4), bool)), "mask .* is not as long as tokens"),
        (broken(mask=np.array([[0, 1, 1, 1, 1]] * 2, bool)), r"padding before .* rows \[0, 1\]"),
        (broken(mask=np.array([[1] * 5, [0] * 5], bool)), r"mask has no token in rows \[1\]"),
        (broken(targets=np.full((2, 4), 3, np.int32)), "targets .* is not as long as tokens"),
        (broken(targets=np.full((2, 5), IGNORE, np.int32)), r"nothing to learn in rows \[0, 1\]"),
        (broken(targets=np.full((2, 5), 3, np.int32)), r"after padding in rows \[1\]"),
        (broken(pixels=np.zeros(2)), "pixels is not part of a batch"),
        ({}, "images is missing"),
    ],
)
def test_validation_says_what_is_wrong(batch, reason):
    with pytest.raises(ValueError, match=reason):
        validate_batch(batch, training=True)


def test_validation_lists_everything():
    with pytest.raises(ValueError) as error:
        validate_batch({"tokens": np.zeros((2, 5), np.int64)})
    assert len(str(error.value).splitlines()) == 6  # the summary, four missing, one dtype
