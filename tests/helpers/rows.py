"""Batches from plain arrays of text: one sample a row, its images first.

`lay_out` takes what is easy to write by hand:

    images          [B, F, H, W, 3]
    tokens, mask    [B, T]     text behind the images
    targets         [B, T]     decoder-only, optional: what follows each of `tokens`, or IGNORE
                    [B, U]     encoder-decoder, optional
    decoder_tokens  [B, U]     encoder-decoder
    qformer_tokens, qformer_mask  [B, L]   optional

and gives a batch (`data/spec.py`) that asks all T tokens, or all U, so that logits are aligned with
them.
"""

from collections.abc import Mapping

import numpy as np

from jax_instructblip.data.spec import IGNORE
from jax_instructblip.models.variants import Variant


def lay_out(variant: Variant, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    tokens, mask = np.asarray(given["tokens"]), np.asarray(given["mask"], bool)
    rows, text = tokens.shape
    images = np.asarray(given["images"])
    frames = images.shape[1]
    visual = frames * variant.visual_tokens
    own = np.arange(visual, dtype=np.int32)
    spread = lambda row: np.broadcast_to(row, (rows, len(row))).astype(np.int32)
    batch = {
        "images": images,
        "image_sample": np.ones((rows, frames), np.int32),
        "tokens": np.pad(tokens, ((0, 0), (visual, 0))).astype(np.int32),
        "slots": spread(np.concatenate([own, np.full(text, -1)])),
        "segments": np.pad(mask, ((0, 0), (visual, 0)), constant_values=True).astype(np.int32),
        "positions": spread(np.arange(visual + text)),
        "places": spread(own),
    }
    for name in ("qformer_tokens", "qformer_mask"):
        if name in given:
            leaf = np.asarray(given[name])
            batch[name] = leaf.astype(bool if name == "qformer_mask" else np.int32)[:, None]
    if variant.llm.encoder_decoder:
        if "decoder_tokens" not in given:
            return batch
        decoder = np.asarray(given["decoder_tokens"]).astype(np.int32)
        batch |= {"decoder_tokens": decoder, "decoder_segments": np.ones(decoder.shape, np.int32)}
        asked = np.arange(decoder.shape[1])
    else:
        asked = visual + np.arange(text)
    batch["asked"] = spread(asked)
    missing = np.full(batch["asked"].shape, IGNORE)
    batch["targets"] = np.asarray(given.get("targets", missing)).astype(np.int32)
    return batch


def read_text(variant: Variant, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The plain arrays that `lay_out` made `batch` of."""
    visual = batch["images"].shape[1] * variant.visual_tokens
    given = {
        "images": batch["images"],
        "tokens": batch["tokens"][:, visual:],
        "mask": batch["segments"][:, visual:] > 0,
    }
    given |= {
        name: batch[name][:, 0] for name in ("qformer_tokens", "qformer_mask") if name in batch
    }
    return given | {name: batch[name] for name in ("decoder_tokens", "targets") if name in batch}


def to_answer(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch without what only training reads."""
    training = ("targets", "asked", "decoder_tokens", "decoder_segments")
    return {name: leaf for name, leaf in batch.items() if name not in training}


def spread(mask, left):
    """Columns that put the padding of each row first, or anywhere, and keep the tokens in order."""
    place = np.sort(mask) if left else np.random.default_rng(0).permuted(mask, axis=1)
    order = np.argsort(~mask, axis=1, kind="stable")  # tokens, then padding
    back = np.argsort(np.argsort(~place, axis=1, kind="stable"), axis=1)
    return np.take_along_axis(order, back, axis=1)


def scattered(batch, left):
    """The batch with its padding elsewhere, indices following."""
    moved = dict(batch)

    def move(segments, names, indices):
        order = spread(batch[segments] > 0, left)
        moved.update({name: np.take_along_axis(batch[name], order, axis=1) for name in names})
        nowhere = np.full((len(order), 1), order.shape[1])
        went = np.concatenate([np.argsort(order, axis=1), nowhere], axis=1)
        for name in indices:
            moved[name] = np.take_along_axis(went, batch[name], axis=1).astype(np.int32)

    decoding = "decoder_segments" in batch
    names = ("segments", "tokens", "slots", "positions")
    move("segments", names, ("places",) if decoding else ("places", "asked"))
    if decoding:
        move("decoder_segments", ("decoder_segments", "decoder_tokens"), ("asked",))
    order = spread(batch["qformer_mask"][:, 0], left)[:, None]
    for name in ("qformer_tokens", "qformer_mask"):
        moved[name] = np.take_along_axis(batch[name], order, axis=2)
    return moved
