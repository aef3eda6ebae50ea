"""What a batch is, and how examples become one.

A batch is a dict of numpy arrays. Padding is only at the end of a row, and no result depends on it:

    images          [B, F, H, W, 3] uint8   F frames in order of time; a still image is F = 1
    qformer_tokens  [B, L] int32            the instruction for the Q-Former
    qformer_mask    [B, L] bool             True on tokens, False on padding
    tokens          [B, T] int32            what the language model reads after the image
    mask            [B, T] bool
    truncated       [B, 3] int32            optional: 1 where instruction, prompt, answer were cut

and for training

    targets         [B, T] int32            LLaMA: what follows each of `tokens`
                    [B, U] int32            T5: the answer
    decoder_tokens  [B, U] int32            T5 only: `targets` shifted right by one

For example LLaMA, B = 2, T = 6 (`<` and `>` stand for `</s>`, `.` for padding, `-` for IGNORE):

    tokens   < what ? a cup >      mask   1 1 1 1 1 1      targets   - - a cup > -
             < and  ? 2 >   .             1 1 1 1 1 0                - - 2 >   - -

An example is the same without the batch axis, the masks and the padding.
"""

from collections.abc import Mapping, Sequence

import numpy as np

IGNORE = -100  # a target that the loss passes over

Batch = dict[str, np.ndarray]
Lengths = Mapping[str, int | Sequence[int]]

# The key whose bucket a padded key takes: arrays of one row must stay equally long.
_LENGTH_OF = {
    "qformer_tokens": "qformer_tokens",
    "tokens": "tokens",
    "targets": "targets",
    "decoder_tokens": "targets",
}
_MASK_OF = {"qformer_tokens": "qformer_mask", "tokens": "mask"}
_NOT_PADDED = ("images", "truncated")


def collate(
    examples: Sequence[Mapping[str, np.ndarray]],
    *,
    lengths: Lengths | None = None,
    pad_id: int = 0,
    qformer_pad_id: int = 0,
) -> Batch:
    """One batch of the examples, in their order, padded on the right.

    `lengths` gives the padded length of `tokens`, `qformer_tokens` and (T5) `targets`: one number,
    or several buckets of which the smallest that fits is taken. A key without an entry is padded to
    the longest example. `pad_id` is the language model's padding id.
    """
    if not examples:
        raise ValueError("there are no examples to make a batch of")
    lengths = dict(lengths or {})
    if unknown := sorted(set(lengths) - set(_LENGTH_OF.values())):
        raise ValueError(
            f"lengths has unknown keys {unknown}, expected some of qformer_tokens, tokens, targets"
        )
    keys = list(examples[0])
    for index, example in enumerate(examples):
        if set(example) != set(keys):
            raise ValueError(
                f"example {index} has the keys {sorted(example)}, example 0 has {sorted(keys)}"
            )
    pads = {
        "tokens": pad_id,
        "decoder_tokens": pad_id,
        "qformer_tokens": qformer_pad_id,
        "targets": IGNORE,
    }
    aligned = "decoder_tokens" not in keys  # LLaMA: a target for each token
    batch: Batch = {}
    for key in keys:
        rows = [np.asarray(example[key]) for example in examples]
        if key in _NOT_PADDED:
            batch[key] = _stack(key, rows)
            continue
        if key not in pads:
            raise ValueError(f"an example has the unknown key {key!r}")
        name = "tokens" if key == "targets" and aligned else _LENGTH_OF[key]
        length = bucket(max(len(row) for row in rows), lengths.get(name), name)
        batch[key] = pad_to(rows, length, pads[key])
        if key in _MASK_OF:
            held = np.array([len(row) for row in rows])
            batch[_MASK_OF[key]] = np.arange(length) < held[:, None]
    return batch


def bucket(length: int, buckets: int | Sequence[int] | None, name: str) -> int:
    """The smallest of `buckets` that holds `length` tokens; `length` itself without buckets."""
    if buckets is None:
        return max(length, 1)
    buckets = [buckets] if isinstance(buckets, int) else sorted(buckets)
    for size in buckets:
        if length <= size:
            return size
    raise ValueError(
        f"{name} has a row of {length} tokens, more than the largest of the lengths {buckets}: "
        f"raise lengths[{name!r}], or lower the limit of tokens"
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


def text_positions(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """[2] int64: how many positions of the batch's texts hold a token, and how many there are.

    Counted is what a tower works on: the instruction, the prompt and, for T5, the answer.
    """
    held = [batch["qformer_mask"], batch["mask"]]
    if "decoder_tokens" in batch:
        held.append(batch["targets"] != IGNORE)
    return np.array([sum(each.sum() for each in held), sum(each.size for each in held)], np.int64)


def validate_batch(batch: Mapping[str, np.ndarray], *, training: bool = False) -> None:
    """Raises a `ValueError` that lists everything in which `batch` is not what the top says."""
    wrong = _wrong_arrays(batch, training)
    if not wrong:
        wrong = [*_wrong_masks(batch), *(_wrong_targets(batch) if training else [])]
    if wrong:
        raise ValueError("this is not a batch:\n  " + "\n  ".join(wrong))


def _wrong_arrays(batch: Mapping[str, np.ndarray], training: bool) -> list[str]:
    expected = {
        "images": (np.uint8, 5),
        "qformer_tokens": (np.int32, 2),
        "qformer_mask": (np.bool_, 2),
        "tokens": (np.int32, 2),
        "mask": (np.bool_, 2),
    }
    optional = {
        "truncated": (np.int32, 2),
        "targets": (np.int32, 2),
        "decoder_tokens": (np.int32, 2),
    }
    if training:
        expected["targets"] = optional["targets"]
    wrong = [f"{key} is missing" for key in expected if key not in batch]
    wrong += [f"{key} is not part of a batch" for key in batch if key not in expected | optional]
    for key, (dtype, rank) in (expected | optional).items():
        if key in batch and (batch[key].dtype != dtype or batch[key].ndim != rank):
            wrong.append(
                f"{key} is {batch[key].dtype} {batch[key].shape}, expected {np.dtype(dtype)} of "
                f"{rank} dimensions"
            )
    if wrong:
        return wrong
    rows = len(batch["images"])
    wrong += [
        f"{key} has {len(value)} rows, images has {rows}"
        for key, value in batch.items()
        if len(value) != rows
    ]
    if batch["images"].shape[-1] != 3 or 0 in batch["images"].shape:
        wrong.append(f"images has shape {batch['images'].shape}, expected [B, F, H, W, 3]")
    for key, other in (
        ("qformer_mask", "qformer_tokens"),
        ("mask", "tokens"),
        ("targets", "decoder_tokens" if "decoder_tokens" in batch else "tokens"),
    ):
        if key in batch and batch[key].shape != batch[other].shape:
            wrong.append(f"{key} {batch[key].shape} is not as long as {other} {batch[other].shape}")
    return wrong


def _wrong_masks(batch: Mapping[str, np.ndarray]) -> list[str]:
    wrong = []
    for key in ("qformer_mask", "mask"):
        mask = batch[key]
        if holes := np.flatnonzero((~mask[:, :-1] & mask[:, 1:]).any(axis=1)).tolist():
            wrong.append(f"{key} has padding before a token in rows {holes}: compact() moves it")
        if empty := np.flatnonzero(~mask.any(axis=1)).tolist():
            wrong.append(f"{key} has no token in rows {empty}")
    return wrong


def _wrong_targets(batch: Mapping[str, np.ndarray]) -> list[str]:
    wrong = []
    targets = batch["targets"]
    if empty := np.flatnonzero((targets == IGNORE).all(axis=1)).tolist():
        wrong.append(f"targets has nothing to learn in rows {empty}")
    if "decoder_tokens" not in batch:
        padding = (targets != IGNORE) & ~batch["mask"]
        if rows := np.flatnonzero(padding.any(axis=1)).tolist():
            wrong.append(f"targets asks for something after padding in rows {rows}")
    return wrong


def _stack(key: str, rows: Sequence[np.ndarray]) -> np.ndarray:
    shapes = sorted({row.shape for row in rows})
    if len(shapes) > 1:
        raise ValueError(
            f"{key} of one batch must have one shape, found {', '.join(map(str, shapes))}"
        )
    return np.stack(rows)
