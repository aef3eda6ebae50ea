"""Makes batches of examples: packs samples into rows, and mixes text tokens and visual vectors.

An example is one sample, a dict of numpy arrays without a batch axis and without padding:

    images          [F, H, W, 3] uint8   its images in order, or the frames of a video; may be none
    patches         [F, P, D] bfloat16   their patch features in place of `images`
    image_at        [F] int32            index of the token before which each image goes; default 0
    qformer_tokens  [L] int32            the instruction, for a Q-Former that reads it
    tokens          [T] int32            the text that the language model reads
    truncated       [3] int32            optional: 1 where instruction, prompt, answer were cut

and for training

    targets         [T] int32            decoder-only: the token where it is learned, else IGNORE
                    [U] int32            encoder-decoder (T5): the answer
    decoder_tokens  [U] int32            encoder-decoder only: `targets` shifted right by one

In a row each image takes as many slots as it has visual vectors. The keys of a batch are listed in
`spec.py` and drawn in `models/vlm.py`. Padding stands at the end of a row. Neither padding nor the
other samples of a row change a sample's result (without dropout).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_instructblip.data.spec import FIELDS, NOWHERE, PAD_ID, Batch
from jax_instructblip.data.spec import IGNORE as IGNORE

Example = Mapping[str, np.ndarray]
Lengths = Mapping[str, int | Sequence[int]]

# ROW_LENGTHS are the keys that the argument `lengths` of `collate` may have.
ROW_LENGTHS = ("images", "qformer_tokens", "slots", "targets")


def collate(
    examples: Sequence[Example],
    *,
    visual_tokens: int = 0,
    samples_per_row: int = 1,
    lengths: Lengths | None = None,
    pad_id: int = 0,
    qformer_pad_id: int = 0,
) -> Batch:
    """Returns a batch: `samples_per_row` consecutive examples a row, padded on the right.

    Args:
      examples: dicts of arrays as listed at the top of this file.
      visual_tokens: number of vectors that an image becomes; 0 only if no example has images.
      samples_per_row: number of examples that share a row; it must divide the number of examples.
      lengths: width of the rows by name: `slots`, `qformer_tokens`, `targets` (also the width of
        the decoder's tokens) and `images` (their number). A value is one number, or several of
        which the smallest sufficient one is taken. A name without a value gets the width of the
        longest row.
      pad_id: the language model's padding id.
      qformer_pad_id: the Q-Former's padding id.

    Returns:
      The arrays of the batch [rows, ...], and `truncated` [examples, 3] where the examples have it.

    Raises:
      ValueError: examples do not fit together, or one is longer than `lengths` allows.
    """
    lengths = dict(lengths or {})
    _check_examples(examples, samples_per_row, lengths)
    rows = [
        _Row(examples[first : first + samples_per_row], visual_tokens)
        for first in range(0, len(examples), samples_per_row)
    ]

    def width(name: str, counts: Iterable[int]) -> int:
        return bucket(max(counts), lengths.get(name), name)

    def pad(name: str, values: Sequence[np.ndarray], length: int, into: int = 0) -> None:
        own = qformer_pad_id if name == "qformer_tokens" else pad_id
        known: dict[Any, int] = {NOWHERE: into, PAD_ID: own}
        filler: Any = FIELDS[name].pad
        batch[name] = pad_to(values, length, known[filler] if filler in known else filler)

    slots = width("slots", (len(row.tokens) for row in rows))
    batch: Batch = {}
    if (kind := _visual(examples[0])) in examples[0]:
        images = width("images", (len(row.image_sample) for row in rows))
        batch[kind] = _stack_images([row.images for row in rows], images)
        pad("image_sample", [row.image_sample for row in rows], images)
        pad("places", [row.places for row in rows], images * visual_tokens, into=slots)
    if "qformer_tokens" in examples[0]:
        texts = [np.asarray(example["qformer_tokens"]) for example in examples]
        length = width("qformer_tokens", map(len, texts))
        apart = (len(rows), samples_per_row, length)
        pad("qformer_tokens", texts, length)
        batch["qformer_tokens"] = batch["qformer_tokens"].reshape(apart)
        text_lengths = np.array([len(text) for text in texts])
        batch["qformer_mask"] = (np.arange(length) < text_lengths[:, None]).reshape(apart)
    for name in ("tokens", "slots", "segments", "positions"):
        pad(name, [getattr(row, name) for row in rows], slots)
    if "targets" in examples[0]:
        targets = width("targets", (len(row.targets) for row in rows))
        pad("targets", [row.targets for row in rows], targets)
        decodes = "decoder_tokens" in examples[0]  # each decoder slot predicts one target
        pad("asked", [row.asked for row in rows], targets, into=targets if decodes else slots)
        if decodes:
            pad("decoder_tokens", [row.decoder for row in rows], targets)
            pad("decoder_segments", [row.decoder_segments for row in rows], targets)
    if "truncated" in examples[0]:
        batch["truncated"] = np.stack([example["truncated"] for example in examples])
    return batch


class _Row:
    """The samples of one row, one after another in its slots, without padding.

    Its attributes are the row's arrays by their keys in a batch: `tokens`, `slots`, `segments` ...
    """

    def __init__(self, examples: Sequence[Example], visual_tokens: int):
        parts: dict[str, list[np.ndarray]] = {}
        slot = vector = answered = 0
        for sample, example in enumerate(examples, start=1):
            own = lay_slots(example, visual_tokens)
            length = len(own["slots"])
            visual = own["slots"] >= 0
            own["slots"] = np.where(visual, own["slots"] + vector, -1)
            own["segments"] = np.full(length, sample)
            own["positions"] = np.arange(length)
            own["places"] = slot + np.flatnonzero(visual)
            own["image_sample"] = np.full(visual.sum() // max(visual_tokens, 1), sample)
            if "decoder_tokens" in example:
                own["decoder"] = np.asarray(example["decoder_tokens"])
                own["targets"] = np.asarray(example["targets"])
                if own["targets"].shape != own["decoder"].shape:
                    raise ValueError(
                        f"targets {own['targets'].shape} is not as long as decoder_tokens "
                        f"{own['decoder'].shape}"
                    )
                own["decoder_segments"] = np.full(len(own["decoder"]), sample)
                own["asked"] = answered + np.arange(len(own["decoder"]))
                answered += len(own["decoder"])
            elif "targets" in example:
                own["asked"] = slot + own["asked"]
            slot, vector = slot + length, vector + visual.sum()
            for name, values in own.items():
                parts.setdefault(name, []).append(values)
        self._parts = {name: np.concatenate(values) for name, values in parts.items()}
        kind = _visual(examples[0])
        self.images = [example[kind] for example in examples if kind in example]

    def __getattr__(self, name: str) -> np.ndarray:
        return self._parts[name]


def lay_slots(example: Example, visual_tokens: int) -> dict[str, np.ndarray]:
    """Returns `tokens` and `slots` [X] of one sample: each image stands before token `image_at`.

    `visual_tokens` is the number of vectors of one image.
    `slots` is -1 for a text token, else the number of a visual vector. For a decoder-only model
    with `targets` in the example, the result also has `targets` [A] without those ignored, and
    `asked` [A]: the slot before each target, whose logits predict it. Two images of two vectors at
    tokens 1 and 3 (v is a visual vector), where the last of four tokens is a target:

        tokens   a  v  v  b  c  v  v  d
        slots   -1  0  1 -1 -1  2  3 -1        asked  6

    Raises:
        ValueError: `image_at` is not rising or points outside of the text, or the first slot is a
            target, before which there is no slot to predict it.
    """
    text = np.asarray(example["tokens"])
    count = len(example.get(_visual(example), ()))
    at = np.asarray(example.get("image_at", np.zeros(count, np.int32)))
    if at.shape != (count,) or (np.diff(at) < 0).any() or (count and not 0 <= at[0] <= at[-1]):
        raise ValueError(f"image_at is {at.tolist()}, expected {count} places in order")
    if count and at[-1] > len(text):
        raise ValueError(f"image_at is {at.tolist()}, but there are {len(text)} tokens")
    index = np.arange(len(text))
    places = index + visual_tokens * np.searchsorted(at, index, side="right")
    slots = np.full(len(text) + count * visual_tokens, -1)
    visual = np.ones(len(slots), bool)
    visual[places] = False
    slots[visual] = np.arange(count * visual_tokens)
    tokens = np.zeros(len(slots), np.int32)
    tokens[places] = text
    laid = {"tokens": tokens, "slots": slots}
    if "targets" in example and "decoder_tokens" not in example:
        targets = np.asarray(example["targets"])
        if targets.shape != text.shape:
            raise ValueError(f"targets {targets.shape} is not as long as tokens {text.shape}")
        learned = targets != IGNORE
        laid |= {"targets": targets[learned], "asked": places[learned] - 1}
        if (laid["asked"] < 0).any():
            raise ValueError("the first slot is a target, but nothing stands before it")
    return laid


def _visual(example: Example) -> str:
    """Returns the key of an example's images, or of the patch features in their place."""
    return "patches" if "patches" in example else "images"


def bucket(length: int, buckets: int | Sequence[int] | None, name: str) -> int:
    """Returns the smallest of `buckets` that is at least `length`.

    Without buckets (None) it returns `length`, but at least 1.

    Raises:
        ValueError: `length` is above the largest bucket; the message names `name`, the key of
            `lengths` that is too small.
    """
    if buckets is None:
        return max(length, 1)
    buckets = [buckets] if isinstance(buckets, int) else sorted(buckets)
    for size in buckets:
        if length <= size:
            return size
    raise ValueError(
        f"{name} has a row of {length}, more than the largest of the lengths {buckets}: raise "
        f"lengths[{name!r}], or lower the limit of tokens"
    )


def pad_to(rows: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    """Returns the rows as one array [B, length] int32, each filled up on the right with `value`.

    Raises:
        ValueError: a row is longer than `length`.
    """
    out = np.full((len(rows), length), value, np.int32)
    for index, row in enumerate(rows):
        if row.ndim != 1 or len(row) > length:
            raise ValueError(
                f"row {index} has shape {row.shape}, expected [T] with at most {length} tokens"
            )
        out[index, : len(row)] = row
    return out


def compact(tokens: np.ndarray, mask: np.ndarray, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns `tokens` [B, T] and `mask` [B, T] bool with all padding moved to the end, order kept.

    `mask` is True on tokens. The function is for input from elsewhere, padded on the left or with
    gaps (a dot is padding):

        . . a b        a b . .
        a . . b   ->   a b . .
    """
    mask = np.asarray(mask).astype(bool)
    tokens = np.asarray(tokens)
    if tokens.shape != mask.shape or tokens.ndim != 2:
        raise ValueError(
            f"tokens {tokens.shape} and mask {mask.shape} do not match, expected both [B, T]"
        )
    order = np.argsort(~mask, axis=1, kind="stable")
    mask = np.take_along_axis(mask, order, axis=1)
    return np.where(mask, np.take_along_axis(tokens, order, axis=1), pad_id), mask


def slot_counts(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns [2] int64: the number of token positions in use, and of all with padding.

    All positions that a network computes are counted: the Q-Former's texts, the slots of rows and,
    for an encoder-decoder, the decoder's tokens.
    """
    used = [batch[name] for name in ("qformer_mask", "caption_mask") if name in batch]
    used += [batch[name] > 0 for name in ("segments", "decoder_segments") if name in batch]
    return np.array([sum(each.sum() for each in used), sum(each.size for each in used)], np.int64)


def sample_sizes(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns [samples, 4] int64: the images, instruction ids, slots and targets of each sample.

    Samples are in the order of the rows; padding is not counted. A pair of BLIP-2's first stage is
    one image and the ids of a caption, without slots and targets.
    """
    if "caption_mask" in batch:
        text = batch["caption_mask"].sum(axis=1)
        none = np.zeros_like(text)
        return np.stack([none + 1, text, none, none], axis=1).astype(np.int64)
    segments = batch["segments"]
    samples = np.arange(1, max(segments.max(initial=1), 1) + 1)
    if "qformer_mask" in batch:
        samples = np.arange(1, batch["qformer_mask"].shape[1] + 1)
    count = lambda owners: (owners[:, None] == samples[:, None]).sum(axis=-1)  # [G, J]
    text = batch["qformer_mask"].sum(axis=-1) if "qformer_mask" in batch else count(segments[:, :0])
    if "decoder_segments" in batch:
        owners = batch["decoder_segments"]
    else:
        asked = np.minimum(batch["asked"], segments.shape[1] - 1)
        owners = np.take_along_axis(segments, asked, axis=1) * (batch["targets"] != IGNORE)
    each = (count(batch["image_sample"]), text, count(segments), count(owners))
    return np.stack(each, axis=-1).reshape(-1, len(each)).astype(np.int64)


def _check_examples(examples: Sequence[Example], per_row: int, lengths: Mapping[str, Any]) -> None:
    if not examples:
        raise ValueError("there are no examples to make a batch of")
    if per_row < 1 or len(examples) % per_row:
        raise ValueError(
            f"{len(examples)} examples cannot be laid into rows of {per_row} each: expected a "
            "multiple of samples_per_row, which is at least 1"
        )
    if unknown := sorted(set(lengths) - set(ROW_LENGTHS)):
        raise ValueError(
            f"lengths has unknown keys {unknown}, expected some of {', '.join(ROW_LENGTHS)}"
        )
    known = {"images", "patches", "image_at", "qformer_tokens", "tokens", "truncated", "targets"}
    if unknown := sorted(set(examples[0]) - known - {"decoder_tokens"}):
        raise ValueError(f"an example has the unknown keys {unknown}")
    for index, example in enumerate(examples):
        if set(example) - {"image_at"} != set(examples[0]) - {"image_at"}:
            raise ValueError(
                f"example {index} has the keys {sorted(example)}, "
                f"example 0 has {sorted(examples[0])}"
            )


def _stack_images(rows: Sequence[Sequence[np.ndarray]], count: int) -> np.ndarray:
    """Returns [G, count, H, W, 3]: the images of each row's samples, filled up with black ones.

    Patch features [P, D] likewise become [G, count, P, D], filled up with zeros.
    """
    shapes = sorted({each.shape[1:] for images in rows for each in images if len(each)})
    if len(shapes) > 1:
        sizes = ", ".join(map(str, shapes))
        raise ValueError(f"images of one batch must have one shape, found {sizes}")
    dtype = rows[0][0].dtype
    shape = shapes[0] if shapes else rows[0][0].shape[1:]
    out = np.zeros((len(rows), count, *shape), dtype)
    for row, images in enumerate(rows):
        start = 0
        for each in images:
            out[row, start : start + len(each)] = each
            start += len(each)
    return out
