import numpy as np
import pytest

from jax_instructblip.data.batch import (
    IGNORE,
    bucket,
    collate,
    compact,
    lay_slots,
    pad_to,
    sample_sizes,
    slot_counts,
)


def ids(*values):
    return np.array(values, np.int32)


def example(tokens, targets, qformer=(101, 102), decoder=None, frames=1, at=None):
    made = {
        "images": np.full((frames, 2, 2, 3), tokens[0], np.uint8),
        "qformer_tokens": ids(*qformer),
        "tokens": ids(*tokens),
        "targets": ids(*targets),
        "truncated": ids(0, 1, 0),
    }
    if decoder is not None:
        made["decoder_tokens"] = ids(*decoder)
    return made if at is None else made | {"image_at": ids(*at)}


LLAMA = [
    example([2, 5, 6, 7, 2], [-100, -100, 6, 7, 2]),
    example([2, 8, 2], [-100, -100, 2], qformer=(101, 9, 9, 102)),
]
T5 = [
    example([5, 6, 1], [7, 8, 9, 1], decoder=[0, 7, 8, 9]),
    example([5, 6, 6, 6, 1], [7, 1], decoder=[0, 7]),
]


def equal(batch, **expected):
    for name, value in expected.items():
        np.testing.assert_array_equal(batch[name], value, err_msg=name)


def test_llama_rows_have_the_image_first():
    batch = collate(LLAMA, pad_id=32000, visual_tokens=2)
    equal(
        batch,
        tokens=[[0, 0, 2, 5, 6, 7, 2], [0, 0, 2, 8, 2, 32000, 32000]],
        slots=[[0, 1, -1, -1, -1, -1, -1]] * 2,
        segments=[[1] * 7, [1, 1, 1, 1, 1, 0, 0]],
        positions=[[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 0, 0]],
        places=[[0, 1]] * 2,
        targets=[[6, 7, 2], [2, IGNORE, IGNORE]],
        asked=[[3, 4, 5], [3, 7, 7]],  # the slot before each; 7: nowhere
        qformer_tokens=[[[101, 102, 0, 0]], [[101, 9, 9, 102]]],
        qformer_mask=[[[1, 1, 0, 0]], [[1, 1, 1, 1]]],
        image_sample=[[1], [1]],
        truncated=[[0, 1, 0]] * 2,
    )
    assert batch["images"].shape == (2, 1, 2, 2, 3) and batch["images"].dtype == np.uint8


def test_t5_pads_answers_by_themselves():
    batch = collate(T5, visual_tokens=3)
    equal(
        batch,
        targets=[[7, 8, 9, 1], [7, 1, IGNORE, IGNORE]],
        decoder_tokens=[[0, 7, 8, 9], [0, 7, 0, 0]],
        decoder_segments=[[1, 1, 1, 1], [1, 1, 0, 0]],
        asked=[[0, 1, 2, 3], [0, 1, 4, 4]],
    )
    assert batch["tokens"].shape == (2, 8)


def test_samples_of_a_row_follow_each_other():
    batch = collate([*LLAMA, *LLAMA[::-1]], samples_per_row=2, visual_tokens=1, pad_id=9)
    equal(
        batch,
        tokens=[[0, 2, 5, 6, 7, 2, 0, 2, 8, 2], [0, 2, 8, 2, 0, 2, 5, 6, 7, 2]],
        slots=[[0, -1, -1, -1, -1, -1, 1, -1, -1, -1], [0, -1, -1, -1, 1, -1, -1, -1, -1, -1]],
        segments=[[1] * 6 + [2] * 4, [1] * 4 + [2] * 6],
        positions=[[*range(6), *range(4)], [*range(4), *range(6)]],
        places=[[0, 6], [0, 4]],
        asked=[[2, 3, 4, 8], [2, 6, 7, 8]],
        targets=[[6, 7, 2, 2], [2, 6, 7, 2]],
        image_sample=[[1, 2]] * 2,
    )
    assert batch["images"].shape == (2, 2, 2, 2, 3)
    equal(batch, images=np.stack([np.full((2, 2, 2, 3), 2, np.uint8)] * 2))
    assert batch["qformer_tokens"].shape == (2, 2, 4)
    decoded = collate(T5, samples_per_row=2, visual_tokens=1)
    equal(
        decoded,
        decoder_tokens=[[0, 7, 8, 9, 0, 7]],
        decoder_segments=[[1, 1, 1, 1, 2, 2]],
        targets=[[7, 8, 9, 1, 7, 1]],
        asked=[[0, 1, 2, 3, 4, 5]],
        segments=[[1] * 4 + [2] * 6],
    )


def test_images_stand_where_image_at_says():
    """The picture of the docstring; a target behind an image is asked of the image's last slot."""
    two = example([3, 4, 5, 6], [IGNORE, 4, IGNORE, 6], frames=2, at=[1, 3])
    laid = lay_slots(two, 2)
    equal(laid, tokens=[3, 0, 0, 4, 5, 0, 0, 6], slots=[-1, 0, 1, -1, -1, 2, 3, -1])
    equal(laid, targets=[4, 6], asked=[2, 6])
    last = lay_slots(example([3, 4], [IGNORE, 4], at=[2]), 2)
    equal(last, slots=[-1, -1, 0, 1], asked=[0])
    none = example([3, 4], [IGNORE, 4], frames=0)
    equal(lay_slots(none, 2), slots=[-1, -1], asked=[0])
    batch = collate([two, none], visual_tokens=2)
    equal(batch, image_sample=[[1, 1], [0, 0]], places=[[1, 2, 5, 6], [8] * 4])
    assert batch["images"].shape == (2, 2, 2, 2, 3) and not batch["images"][1].any()
    both = collate(
        [two, none, example([8, 9], [IGNORE, 9])] * 2, samples_per_row=3, visual_tokens=2
    )
    equal(both, image_sample=[[1, 1, 3]] * 2, places=[[1, 2, 5, 6, 10, 11]] * 2)


def test_the_first_token_can_be_learned_behind_an_image_only():
    first = example([8, 9], [8, 9])
    equal(lay_slots(first, 2), asked=[1, 2], targets=[8, 9])
    with pytest.raises(ValueError, match="first slot is a target, but nothing stands before it"):
        lay_slots(first | {"image_at": ids(2)}, 2)


@pytest.mark.parametrize(
    ("frames", "at", "reason"),
    [
        (2, [1], r"image_at is \[1\], expected 2 places in order"),
        (2, [2, 1], "expected 2 places in order"),
        (1, [-1], "expected 1 places in order"),
        (1, [3], r"image_at is \[3\], but there are 2 tokens"),
    ],
)
def test_places_outside_of_the_text_are_refused(frames, at, reason):
    with pytest.raises(ValueError, match=reason):
        lay_slots(example([8, 9], [IGNORE, 9], frames=frames, at=at), 2)


def test_slots_in_use_are_counted():
    llama = collate([example([1, 2, 3], [IGNORE, 2, 3]), example([1], [IGNORE])], visual_tokens=4)
    assert slot_counts(llama).tolist() == [7 + 5 + 2 + 2, 14 + 4]
    t5 = collate([example([1, 2, 3], [7, 9], decoder=[0, 7]), example([1], [9], decoder=[0])])
    assert slot_counts(t5).tolist() == [3 + 1 + 2 + 2 + 2 + 1, 6 + 4 + 4]


def test_the_sizes_of_samples_leave_padding_out():
    """Images, instruction ids, slots and targets of each sample, whoever shares its row."""
    samples = [example([1, 2, 3], [IGNORE, 2, 3], frames=2), example([1], [IGNORE])]
    expected = [[2, 2, 11, 2], [1, 2, 5, 0]]
    for shared in (1, 2):
        batch = collate(samples, visual_tokens=4, samples_per_row=shared, lengths={"slots": 20})
        assert sample_sizes(batch).tolist() == expected
    t5 = [example([1, 2, 3], [7, 9], decoder=[0, 7]), example([1], [9], (101,), decoder=[0])]
    for shared in (1, 2):
        batch = collate(t5, visual_tokens=4, samples_per_row=shared)
        assert sample_sizes(batch).tolist() == [[1, 2, 7, 2], [1, 1, 5, 1]]
    pairs = {"caption_mask": np.array([[True, True, False], [True] * 3])}
    assert sample_sizes(pairs).tolist() == [[1, 2, 0, 0], [1, 3, 0, 0]]


def test_buckets_take_the_smallest_that_fits():
    lengths = {"slots": (16, 4, 8), "qformer_tokens": 6, "targets": (2, 5)}
    batch = collate(LLAMA, lengths=lengths)
    assert batch["tokens"].shape == batch["segments"].shape == (2, 8)
    assert batch["targets"].shape == batch["asked"].shape == (2, 5)
    assert batch["qformer_tokens"].shape == batch["qformer_mask"].shape == (2, 1, 6)
    assert not batch["segments"][:, 5:].any()
    batch = collate(T5, lengths={"slots": 8, "targets": (4, 8), "images": 3})
    assert batch["targets"].shape == batch["decoder_tokens"].shape == (2, 4)
    assert batch["tokens"].shape == (2, 8)
    assert batch["images"].shape[1] == batch["image_sample"].shape[1] == 3
    assert [bucket(n, (4, 8), "slots") for n in (1, 4, 5, 8)] == [4, 4, 8, 8]
    assert bucket(0, None, "slots") == 1


def test_row_that_fits_no_bucket_names_length_and_field():
    with pytest.raises(ValueError, match=r"slots has a row of 5, .*\[2, 4\].*raise lengths"):
        collate(LLAMA, lengths={"slots": (4, 2)})
    with pytest.raises(ValueError, match=r"qformer_tokens has a row of 4"):
        collate(LLAMA, lengths={"qformer_tokens": 3})
    with pytest.raises(ValueError, match=r"targets has a row of 4"):
        collate(T5, lengths={"targets": 3})
    with pytest.raises(ValueError, match=r"unknown keys \['token'\]"):
        collate(LLAMA, lengths={"token": 3})


def test_examples_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="no examples"):
        collate([])
    with pytest.raises(ValueError, match="2 examples .* rows of 3 each: expected a multiple"):
        collate(LLAMA, samples_per_row=3)
    with pytest.raises(ValueError, match="example 1 has the keys"):
        collate([LLAMA[0], T5[0]])
    other = LLAMA[1] | {"images": np.zeros((1, 3, 3, 3), np.uint8)}
    with pytest.raises(ValueError, match=r"images of one batch.*\(2, 2, 3\), \(3, 3, 3\)"):
        collate([LLAMA[0], other])
    with pytest.raises(ValueError, match=r"unknown keys \['text'\]"):
        collate([LLAMA[0] | {"text": ids(1)}])
    with pytest.raises(ValueError, match="targets .* is not as long as tokens"):
        collate([LLAMA[0] | {"targets": ids(1)}])
    with pytest.raises(ValueError, match="targets .* is not as long as decoder_tokens"):
        collate([T5[0] | {"targets": ids(1, 2)}])
    with pytest.raises(ValueError, match=r"row 0 has shape \(1, 2\)"):
        pad_to([np.zeros((1, 2), np.int32)], 4, 0)


def test_compact_moves_padding_to_the_end():
    tokens = np.array([[9, 9, 1, 2], [1, 9, 9, 2], [1, 2, 3, 4], [9, 9, 9, 9]])
    mask = np.array([[0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    moved, moved_mask = compact(tokens, mask, pad_id=7)
    np.testing.assert_array_equal(moved, [[1, 2, 7, 7], [1, 2, 7, 7], [1, 2, 3, 4], [7, 7, 7, 7]])
    np.testing.assert_array_equal(
        moved_mask, [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    )
    assert moved_mask.dtype == bool and moved.dtype == tokens.dtype
    with pytest.raises(ValueError, match="do not match"):
        compact(tokens, mask[:, 1:])
