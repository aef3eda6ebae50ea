"""From examples to rows: samples dealt out to rows, texts and visual vectors laid into slots.

An example is one sample, in numpy, without a batch axis and without padding:

    images          [F, H, W, 3] uint8   its images in order; the frames of a video; may be none
    image_at        [F] int32            before which of its tokens each image stands; by default 0
    qformer_tokens  [L] int32            the instruction, where the Q-Former reads it
    tokens          [T] int32            what the language model reads besides the images
    truncated       [3] int32            optional: 1 where instruction, prompt, answer were cut

and for training

    targets         [T] int32            LLaMA: the token itself where it is learned, else IGNORE
                    [U] int32            T5: the answer
    decoder_tokens  [U] int32            T5 only: `targets` shifted right by one

A batch is drawn in `models/vlm.py` and listed in `spec.py`. Padding stands at the end of a row, and
no result depends on it, nor, dropout off, on who shares a row.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_instructblip.data.spec import FIELDS, NOWHERE, PAD_ID, Batch
from jax_instructblip.data.spec import IGNORE as IGNORE

Example = Mapping[str, np.ndarray]
Lengths = Mapping[str, int | Sequence[int]]

# What `lengths` may name: the widths of rows.
ROUND = 64  # slots, of whose multiples rows of several samples are
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
    """Rows of `samples_per_row` examples each, in their order, padded on the right.

    `visual_tokens` are the vectors that an image becomes. `lengths` gives the width of rows: of
    `slots`, `qformer_tokens`, `targets` (and of T5's decoder) and how many `images`; one number, or
    several of which the smallest that fits is taken. What has no entry is as wide as the widest row
    needs. `pad_id` is the language model's padding id. Counts about examples (`truncated`) come
    back as `[examples, ...]`.
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
    if "images" in examples[0]:
        images = width("images", (len(row.image_sample) for row in rows))
        batch["images"] = _stack_images([row.images for row in rows], images)
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
        decodes = "decoder_tokens" in examples[0]  # each slot of a decoder is asked for one target
        pad("asked", [row.asked for row in rows], targets, into=targets if decodes else slots)
        if decodes:
            pad("decoder_tokens", [row.decoder for row in rows], targets)
            pad("decoder_segments", [row.decoder_segments for row in rows], targets)
    if "truncated" in examples[0]:
        batch["truncated"] = np.stack([example["truncated"] for example in examples])
    return batch


class _Row:
    """The samples of one row, laid into its slots one after the other; nothing is padded yet."""

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
        self.images = [example["images"] for example in examples if "images" in example]

    def __getattr__(self, name: str) -> np.ndarray:
        return self._parts[name]


def lay_slots(example: Example, visual_tokens: int) -> dict[str, np.ndarray]:
    """`tokens` and `slots` [X] of one sample, each image before the token that `image_at` names.

    Of a decoder-only model, too, its `targets` and the slots `asked`: those right before them. For
    two images of two vectors at 1 and 3, and a target on the last of four tokens:

        tokens  a . . b c . . d         slots  -1 0 1 -1 -1 2 3 -1         asked  6

    Raises:
        ValueError: images that do not stand in order inside of the text, or a first slot that is a
            target: nothing stands before it.
    """
    text = np.asarray(example["tokens"])
    count = len(example["images"]) if "images" in example else 0
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


def deal(sizes: Sequence[Sequence[int]], rows: int) -> np.ndarray:
    """The samples that share a row, `[rows, samples / rows]`, for rows of nearly one size.

    `sizes` has for each sample how much of every size of a row it takes (its slots, its targets).
    Longest first, each to the emptiest row with room; with one sample a row each stays in its
    place. A function of the sizes alone, so that hosts agree on it.

    Raises:
        ValueError: the samples cannot be divided by the rows.
    """
    if len(sizes) % rows:
        raise ValueError(f"{len(sizes)} samples cannot be dealt out evenly to {rows} rows")
    room = len(sizes) // rows
    if room == 1:
        return np.arange(rows)[:, None]
    whole = [max(sum(each), 1) for each in zip(*sizes, strict=True)]
    fullness = lambda size: sum(a / b for a, b in zip(size, whole, strict=True))
    order = sorted(range(len(sizes)), key=lambda sample: (-fullness(sizes[sample]), sample))
    rows_of_samples: list[list[int]] = [[] for _ in range(rows)]
    fill = [[0] * len(whole) for _ in range(rows)]
    for sample in order:
        free = (row for row in range(rows) if len(rows_of_samples[row]) < room)
        row = min(free, key=lambda row: (fullness(fill[row]), row))
        rows_of_samples[row].append(sample)
        fill[row] = [a + b for a, b in zip(fill[row], sizes[sample], strict=True)]
    return np.array(rows_of_samples)


def round_up(length: int) -> int:
    """The width of rows of several samples whose longest takes `length` slots or targets."""
    return -(-length // ROUND) * ROUND


def bucket(length: int, buckets: int | Sequence[int] | None, name: str) -> int:
    """The smallest of `buckets` that holds `length`; `length` itself without buckets."""
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
    """The rows [B, length] int32, each filled up on the right with `value`."""
    out = np.full((len(rows), length), value, np.int32)
    for index, row in enumerate(rows):
        if row.ndim != 1 or len(row) > length:
            raise ValueError(
                f"row {index} has shape {row.shape}, expected [T] with at most {length} tokens"
            )
        out[index, : len(row)] = row
    return out


def compact(tokens: np.ndarray, mask: np.ndarray, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` [B, T] and `mask` [B, T] bool with all padding moved to the end, order kept.

    For input that comes from elsewhere, padded on the left or with holes:

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
    """[2] int64, the positions of the batch's texts: those in use, and all.

    Counted is what a tower works on: the instructions or captions, the rows and, for T5, the
    decoder's rows.
    """
    used = [batch[name] for name in ("qformer_mask", "caption_mask") if name in batch]
    used += [batch[name] > 0 for name in ("segments", "decoder_segments") if name in batch]
    return np.array([sum(each.sum() for each in used), sum(each.size for each in used)], np.int64)


def _check_examples(examples: Sequence[Example], per_row: int, lengths: Mapping[str, Any]) -> None:
    if not examples:
        raise ValueError("there are no examples to make a batch of")
    if per_row < 1 or len(examples) % per_row:
        raise ValueError(f"{len(examples)} examples cannot be laid into rows of {per_row} each")
    if unknown := sorted(set(lengths) - set(ROW_LENGTHS)):
        raise ValueError(
            f"lengths has unknown keys {unknown}, expected some of {', '.join(ROW_LENGTHS)}"
        )
    known = {"images", "image_at", "qformer_tokens", "tokens", "truncated", "targets"}
    if unknown := sorted(set(examples[0]) - known - {"decoder_tokens"}):
        raise ValueError(f"an example has the unknown keys {unknown}")
    for index, example in enumerate(examples):
        if set(example) - {"image_at"} != set(examples[0]) - {"image_at"}:
            raise ValueError(
                f"example {index} has the keys {sorted(example)}, "
                f"example 0 has {sorted(examples[0])}"
            )


def _stack_images(rows: Sequence[Sequence[np.ndarray]], count: int) -> np.ndarray:
    """[G, count, H, W, 3]: the images of each row's samples, then black ones."""
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
