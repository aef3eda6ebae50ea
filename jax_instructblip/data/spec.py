"""The one list of the keys of a batch: dtype, axes and padding of each.

A batch is a dict of numpy arrays (drawn in `models/vlm.py`). A row is one token sequence of the
language model; it holds one sample, or several packed one after another. The positions of a row are
called slots: each holds a text token or one of the vectors that an image becomes (a visual vector).
Axis 0 of every array counts rows, so hosts, devices and accumulation steps all split axis 0 alone:

    G  rows          H W 3  an image         X  slots of a row           A  targets of a row
    J  samples       L      an instruction   S  visual vectors, I x Q    U  decoder tokens of a row
    I  images of a row, of all its samples   Q  visual vectors of one image
    P  patches of an image, D their width

The first stage of BLIP-2 has a batch of its own, one image and one caption a row (`PAIR_FIELDS`).

`example_batch` makes a valid batch of given sizes; `check` raises with a list of all that is wrong
with a batch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jax_instructblip.models.variants import IMAGE_MEAN, IMAGE_STD, Variant

IGNORE = -100  # target id that the loss ignores

Batch = dict[str, np.ndarray]
NOWHERE = "nowhere"  # padding of an index: the length of the axis it points into
PAD_ID = "pad_id"  # padding of token ids: the tokenizer's pad id


@dataclasses.dataclass(frozen=True)
class Field:
    """Dtype, axes and padding of one key of a batch.

    Attributes:
      dtype: dtype of the array.
      axes: one letter for each axis, as listed at the top of this file.
      pad: the value on padding. For an index into an axis it is `NOWHERE`, which stands for the
        length of that axis; for token ids it is `PAD_ID`, which stands for the tokenizer's own.
      train_only: True for a key that a batch for inference may lack.
    """

    dtype: Any
    axes: str
    pad: Any
    train_only: bool = False


FIELDS = {  # the keys of a batch; all indices count within one row
    "images": Field(np.uint8, "G I H W 3", 0),
    "image_sample": Field(np.int32, "G I", 0),  # its sample, 1 ... J; 0: unused
    "qformer_tokens": Field(np.int32, "G J L", PAD_ID),
    "qformer_mask": Field(np.bool_, "G J L", False),
    "tokens": Field(np.int32, "G X", PAD_ID),
    "slots": Field(np.int32, "G X", -1),  # index of a visual vector in S; -1: a text token
    "segments": Field(np.int32, "G X", 0),
    "positions": Field(np.int32, "G X", 0),
    "places": Field(np.int32, "G S", NOWHERE),  # index in X of each visual vector
    "targets": Field(np.int32, "G A", IGNORE, train_only=True),
    "asked": Field(np.int32, "G A", NOWHERE, train_only=True),  # its slot in X or U
    "decoder_tokens": Field(np.int32, "G U", PAD_ID, train_only=True),
    "decoder_segments": Field(np.int32, "G U", 0, train_only=True),
}


# In place of `images`, where a frozen vision tower has seen them before (`patch_features.py`).
PATCHES = Field(ml_dtypes.bfloat16, "G I P D", 0)

PAIR_FIELDS = {  # BLIP-2's first stage: one image and caption a row
    "images": Field(np.uint8, "G I H W 3", 0),
    "captions": Field(np.int32, "G L", PAD_ID),
    "caption_mask": Field(np.bool_, "G L", False),
    "image_id": Field(np.int32, "G", 0),  # equal for equal images
}


def fields(variant: Variant, *, patches: bool = False) -> dict[str, Field]:
    """Returns the keys that a batch for this model may have, each with its `Field`.

    The `decoder_` keys are only for an encoder-decoder language model. With `patches` the batch
    has patch features in place of images.
    """
    if variant.llm is None:
        return dict(PAIR_FIELDS)
    keep = lambda name: variant.llm.encoder_decoder or not name.startswith("decoder_")
    seen = {"patches": PATCHES} if patches else {"images": FIELDS["images"]}
    return seen | {name: each for name, each in FIELDS.items() if name != "images" and keep(name)}


def unread(variant: Variant) -> tuple[str, ...]:
    """Returns the keys of a batch that this model ignores.

    Those are `qformer_tokens` and `qformer_mask`, where the bridge (the part between the vision
    tower and the language model) does not read the instruction.
    """
    return () if variant.reads_instruction else ("qformer_tokens", "qformer_mask")


def shapes(
    variant: Variant,
    sizes: Mapping[str, int],
    *,
    training: bool = True,
    patches: bool = False,
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns (shape, dtype) of every key that a batch for this model must have.

    `sizes` gives the length of each axis by its letter; J and I are 1 where they are not given. S,
    H, W, P and D follow from the variant. Without `training` the keys that only training reads are
    left out; with `patches` there are patch features in place of images.
    """
    known = {"J": 1, "I": 1, **sizes, **_vision_sizes(variant)}
    known["S"] = known["I"] * variant.visual_tokens  # not used by PAIR_FIELDS
    return {
        name: (tuple(known[letter] for letter in field.axes.split()), field.dtype)
        for name, field in fields(variant, patches=patches).items()
        if (training or not field.train_only) and name not in unread(variant)
    }


def _vision_sizes(variant: Variant) -> dict[str, int]:
    """Returns the lengths of the axes that the vision tower fixes, by their letters."""
    vision = variant.vision
    size = vision.image_size
    return {"H": size, "W": size, "3": 3, "P": vision.tokens, "D": vision.width}


def example_batch(variant: Variant, batch: int = 1, text: int = 4, answer: int = 4) -> Batch:
    """Returns a valid batch of `batch` rows with one sample each, for tests and compilation.

    A row is one black image, `text` tokens of id 0 after it, and `answer` targets. For the first
    stage of BLIP-2 (a variant without a language model) a row is an image and a caption of `text`
    tokens.
    """
    if variant.llm is None:
        sizes = {"G": batch, "L": text}
        pairs: Batch = {name: np.zeros(*each) for name, each in shapes(variant, sizes).items()}
        own = np.arange(batch, dtype=np.int32)
        return pairs | {"caption_mask": ~pairs["caption_mask"], "image_id": own}
    visual = variant.visual_tokens
    sizes = {"G": batch, "X": visual + text, "L": text, "A": answer, "U": answer}
    arrays: dict[str, Any] = {n: np.zeros(*each) for n, each in shapes(variant, sizes).items()}
    slots = np.arange(visual + text, dtype=np.int32)
    arrays["image_sample"] += 1
    if variant.reads_instruction:
        arrays["qformer_mask"] |= True
    arrays["slots"] += np.where(slots < visual, slots, -1)
    arrays["segments"] += 1
    arrays["positions"] += slots
    arrays["places"] += slots[:visual]
    arrays["asked"] += np.arange(answer, dtype=np.int32)
    if variant.llm.encoder_decoder:
        arrays["decoder_segments"] += 1
    else:
        arrays["asked"] += visual + text - answer
    return arrays


def check(batch: Mapping[str, Any], variant: Variant) -> None:
    """Raises a `ValueError` that lists all that is wrong with a batch for the model `variant`."""
    check_arrays(batch, variant)
    seen = ("images", "patches")
    rows = {name: np.asarray(leaf) for name, leaf in batch.items() if name not in seen}
    wrong = _wrong_segments(rows, variant) + _wrong_slots(rows, variant)
    wrong += _wrong_ids(rows, variant) + _wrong_targets(rows, variant)
    wrong += _wrong_instructions(rows, variant) + _wrong_images(batch)
    if wrong:
        raise ValueError("this is not a batch:\n  " + "\n  ".join(wrong))


def to_arrays(batch: Any) -> Batch:
    """Returns the batch with every value (a list, say) turned into a numpy array.

    Raises:
        ValueError: the batch is no dict, or one of its values cannot be an array.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"the batch is a {type(batch).__name__}, expected a dict of arrays")
    arrays = {}
    for name, leaf in batch.items():
        try:
            arrays[name] = np.asarray(leaf)
        except ValueError as error:  # lists of different lengths
            raise ValueError(f"this is not a batch: {name} is no array ({error})") from error
    return arrays


def check_arrays(batch: Mapping[str, Any], variant: Variant) -> None:
    """Raises a `ValueError` that lists missing and unknown keys, and wrong dtypes and shapes."""
    if wrong := _wrong_arrays(batch, variant):
        raise ValueError("this is not a batch:\n  " + "\n  ".join(wrong))


def _wrong_arrays(batch: Mapping[str, Any], variant: Variant) -> list[str]:
    known, wrong = fields(variant, patches="patches" in batch), []
    # A decoder-only model without targets is valid, too: all its logits can be computed.
    training = variant.llm.encoder_decoder or "targets" in batch or "asked" in batch
    for name, field in known.items():
        needed = name not in unread(variant) and (training or not field.train_only)
        if needed and name not in batch:
            wrong.append(f"{name} is missing")
    wrong += [f"{name} is no key of a batch" for name in batch if name not in known]
    sizes = {letter: (size, "the model") for letter, size in _vision_sizes(variant).items()}
    for name in sorted(known.keys() & batch.keys(), key=lambda name: name == "images"):
        field, leaf, letters = known[name], batch[name], known[name].axes.split()
        floats = name == "images" and np.issubdtype(leaf.dtype, np.floating)  # normalised already
        if (leaf.dtype != field.dtype and not floats) or leaf.ndim != len(letters):
            wrong.append(
                f"{name} is {leaf.dtype} {leaf.shape}, expected {np.dtype(field.dtype)} "
                f"[{', '.join(letters)}]"
            )
            continue
        for letter, length in zip(letters, leaf.shape, strict=True):
            expected, origin = sizes.setdefault(letter, (length, name))
            shared = name == "images" and letter == "G" and length == 1  # shared by all rows
            if length != expected and not shared:
                wrong.append(f"{name} has {letter} = {length}, but {origin} has {expected}")
    visual = variant.visual_tokens
    if not wrong and (count := sizes["S"][0]) != (images := sizes["I"][0]) * visual:
        wrong.append(f"places names {count} vectors, {images} images have {visual} each")
    return wrong


def _wrong_images(batch: Mapping[str, Any]) -> list[str]:
    """Returns a complaint if float images are not normalised by CLIP's mean and deviation, else [].

    Their range shows it: values are from 0 to 1, or beyond those that black and white have.
    """
    images = batch.get("images", np.zeros(0))  # patch features may stand in their place
    if not np.issubdtype(images.dtype, np.floating) or not images.size:
        return []
    if images.shape[0] == batch["image_sample"].shape[0]:
        images = images[batch["image_sample"] > 0]  # skip unused images
    mean, std = np.array(IMAGE_MEAN), np.array(IMAGE_STD)
    black, white = ((value - mean) / std for value in (0, 1))
    least, most = float(images.min(initial=np.inf)), float(images.max(initial=-np.inf))
    finite = bool(np.isfinite(images).all())
    if not finite or least < black.min() - 0.01 or most > white.max() + 0.01:
        values = f"from {least:.3g} to {most:.3g}" if finite else "not all finite"
    elif len(images) and least >= 0 and most <= 1:
        values = f"from {least:.3g} to {most:.3g}, as no normalised photograph is"
    else:
        return []
    return [
        f"images are floats {values}: give uint8 pixels from 0 to 255, or floats normalised by "
        f"CLIP's mean and deviation ({black.min():.2f} to {white.max():.2f})"
    ]


def _wrong_segments(batch: Batch, variant: Variant) -> list[str]:
    wrong = []
    most = variant.llm.longest_sample
    for row, answered in enumerate(batch.get("decoder_segments", ())):
        if unknown := sorted(set(answered.tolist()) - {0, *batch["segments"][row].tolist()}):
            wrong.append(f"row {row}: decoder_segments has samples {unknown} that segments has not")
    for name in ("segments", "decoder_segments"):
        for row, segments in enumerate(batch.get(name, ())):
            owners, starts, lengths = np.unique(segments, return_index=True, return_counts=True)
            for owner, first, length in zip(owners, starts, lengths, strict=True):
                if owner == 0:
                    continue
                whole = (segments[first : first + length] == owner).all()
                where = f"row {row}: sample {owner} of {name}"
                if owner < 0 or not whole:
                    wrong.append(f"{where} overlaps another, or has a gap: its slots must be a run")
                elif name == "segments":
                    positions = batch["positions"][row, first : first + length]
                    if (positions != np.arange(length)).any():
                        wrong.append(f"{where} has positions that do not count from 0: {positions}")
                    if most is not None and length > most:
                        wrong.append(f"{where} has {length} slots, the model {most} positions")
    return wrong


def _wrong_slots(batch: Batch, variant: Variant) -> list[str]:
    wrong, visual = [], variant.visual_tokens
    count = batch["places"].shape[1]
    for row, (slots, places, segments, owners) in enumerate(
        zip(*(batch[name] for name in ("slots", "places", "segments", "image_sample")), strict=True)
    ):
        if outside := slots[(slots < -1) | (slots >= count)].tolist():
            wrong.append(f"row {row}: slots {outside} name no vector of the row, which has {count}")
            continue
        used = np.flatnonzero(slots >= 0)
        expected = np.full(count, len(slots))
        expected[slots[used]] = used
        if len(set(slots[used])) < len(used) or (np.minimum(places, len(slots)) != expected).any():
            wrong.append(f"row {row}: places is not the inverse of slots: {places.tolist()}")
        strange = used[owners[slots[used] // visual] != segments[used]]
        if len(strange):
            wrong.append(f"row {row}: slots {strange.tolist()} show an image of another sample")
    return wrong


def _wrong_ids(batch: Batch, variant: Variant) -> list[str]:
    wrong = []
    seen = {"tokens": batch["slots"] < 0}
    for name, vocab in (
        ("tokens", variant.llm.vocab),
        ("decoder_tokens", variant.llm.vocab),
        ("targets", variant.llm.vocab),
        ("qformer_tokens", getattr(variant.bridge, "vocab", 0)),
    ):
        if name not in batch or (name == "qformer_tokens" and not variant.reads_instruction):
            continue
        ids = batch[name]
        bad = ((ids < 0) | (ids >= vocab)) & seen.get(name, True)
        if name == "targets":
            bad &= ids != IGNORE
        if bad.any():
            beyond = np.unique(ids[bad])[:8].tolist()
            wrong.append(f"{name} has ids {beyond}, the model's are 0 to {vocab - 1}")
    return wrong


def _wrong_targets(batch: Batch, variant: Variant) -> list[str]:
    if "asked" not in batch:
        return []
    wrong = []
    owners = batch["decoder_segments" if variant.llm.encoder_decoder else "segments"]
    for row, (asked, targets, segments) in enumerate(
        zip(batch["asked"], batch["targets"], owners, strict=True)
    ):
        real = asked[targets != IGNORE]
        if ((real < 0) | (real >= len(segments))).any():
            wrong.append(f"row {row}: asked has slots outside of the row: {real.tolist()}")
        elif (segments[real] == 0).any():
            wrong.append(f"row {row}: targets are asked of padding")
        inside = asked[(asked >= 0) & (asked < len(segments))]
        if len(np.unique(inside)) < len(inside):
            wrong.append(f"row {row}: asked names a slot twice")
    return wrong


def _wrong_instructions(batch: Batch, variant: Variant) -> list[str]:
    wrong = []
    if "qformer_mask" in batch:
        mask = batch["qformer_mask"]
        holes = np.any(~mask[..., :-1] & mask[..., 1:], axis=(1, 2))
        if holes.any():
            rows = np.flatnonzero(holes).tolist()
            wrong.append(f"qformer_mask has padding before a token in rows {rows}")
        samples = mask.shape[1]
        if (owners := batch["image_sample"]).size and (owners.min() < 0 or owners.max() > samples):
            wrong.append(f"image_sample names samples outside of 0 to {samples}")
        if variant.reads_instruction and owners.size:
            index = np.maximum(owners - 1, 0).clip(max=samples - 1)
            empty = ~np.take_along_axis(mask.any(axis=-1), index, axis=1) & (owners > 0)
            if empty.any():
                rows = np.flatnonzero(empty.any(axis=1)).tolist()
                wrong.append(f"images in rows {rows} have no instruction to be read with")
    return wrong
