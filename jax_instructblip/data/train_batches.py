"""Batches of training samples, made on the host: text, tokens, pixels, then rows of one shape.

    sample k --mixture--> record --template--> prompt, answer --tokens, pixels--> example --> batch

With B samples a batch, batch s always holds the samples s x B ... (s + 1) x B - 1 of the mixture.
So a run can resume at any step and on any number of hosts with the same samples. A host makes only
its own rows of each global batch. (Were the mixture itself sliced by host, a host could get samples
of some sources only, for the order of the sources is periodic.)
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import cast

import ml_dtypes
import numpy as np

from jax_instructblip.data import images
from jax_instructblip.data.batch import bucket, collate
from jax_instructblip.data.conversation import ConversationProcessor
from jax_instructblip.data.mixture import Mixture, Source, digest_of
from jax_instructblip.data.packing import deal, row_lengths
from jax_instructblip.data.patch_features import PatchFeatures
from jax_instructblip.data.rand_augment import rand_augment
from jax_instructblip.data.records import Record
from jax_instructblip.data.spec import IGNORE, Batch
from jax_instructblip.data.text import TextProcessor

ATTEMPTS = 100  # replacements tried for one sample before the run stops
FITTING = 20  # replacements that may be too long before one is cut
WARNINGS = 10  # replaced records that are named in the log

Example = dict[str, np.ndarray]


class TrainBatches:
    """Random access to batches: `batches[s]` holds this host's rows of the global batch s.

    Besides the keys in `spec.py` a batch has, for each of the b samples in these rows, `truncated`
    [b, 3] int32 (1 where instruction, prompt or answer was cut) and `replaced` [b] int32 (the
    number of unusable records that were skipped before a usable one was found).
    """

    def __init__(
        self,
        mixture: Mixture,
        text: TextProcessor,
        *,
        batch_size: int,
        steps: int,
        samples_per_row: int = 1,
        buckets: Sequence[int] = (),
        augment: bool = True,
        crop: str = "squash",
        min_decode_ratio: float = 0.0,
        rand_augment: bool = False,
        upright: bool = True,
        rows: np.ndarray | None = None,
        chat: ConversationProcessor | None = None,
        image_order: str = "written",
        features: PatchFeatures | None = None,
    ):
        """Takes the samples of `mixture`, tokenized by `text`, `batch_size` to a global batch.

        Args:
          mixture: the order of samples.
          text: the tokenizers of the model.
          batch_size: samples of a global batch.
          steps: number of batches.
          samples_per_row: samples that are packed into one row.
          buckets: allowed lengths of texts. With one sample a row, texts are padded to the smallest
            bucket that holds the longest text of the global batch, or to the text's limit if none
            does. Rows of several samples are as wide as `packing.row_lengths` says.
          augment: crop and mirror at random; if False, images are prepared by `crop` (mirroring
            would spoil tasks about left and right, or about written words).
          crop: a name of `images.CROPS`.
          min_decode_ratio: `min_ratio` of `images.random_resized_crop_flip`.
          rand_augment: also apply RandAugment (`rand_augment.py`) after the crop.
          upright: apply the EXIF orientation, as in `images.decode`.
          rows: numbers of this host's rows in the global batch; None means all.
          chat: writes samples as conversations; None means as prompt and answer.
          image_order: with `chat`, the order of images and question, one of `ORDERS`.
          features: the patch features that are read in place of pixels; None reads pixels.

        Raises:
          ValueError: `samples_per_row` does not divide the batch, or `features` with `augment`.
        """
        if features is not None and augment:
            raise ValueError("patch features are of whole images: augment must be False")
        self.features = features
        if samples_per_row < 1 or batch_size % samples_per_row:
            raise ValueError(
                f"{samples_per_row} samples a row do not divide a batch of {batch_size}"
            )
        self.mixture, self.text, self.chat, self.image_order = mixture, text, chat, image_order
        self.batch_size, self.steps = batch_size, steps
        self.samples_per_row, self.row_count = samples_per_row, batch_size // samples_per_row
        size = text.variant.vision.image_size
        self.prepare = ImagePreparation(
            size, augment, crop, min_decode_ratio, rand_augment, upright
        )
        self.rows = np.arange(self.row_count) if rows is None else rows
        self.buckets = {name: _cut(buckets, limit) for name, limit in _limits(text, chat).items()}
        self.replacements = Replacements()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        first = step * self.batch_size
        # Every host reads all texts, so all agree on which samples share a row, and its length.
        texts = {sample: self._text(first + sample) for sample in range(self.batch_size)}
        sizes = [self._size(*each[1:]) for each in texts.values()]
        shared = deal([(size["slots"], size["targets"]) for size in sizes], self.row_count)
        chosen = [int(sample) for sample in shared[self.rows].flat]
        samples = [self._whole(first + sample, *texts[sample]) for sample in chosen]
        llm, qformer = self.text.variant.llm, self.text.qformer
        batch = collate(
            [example for _, example in samples],
            visual_tokens=self.text.variant.visual_tokens,
            samples_per_row=self.samples_per_row,
            lengths=self._lengths(sizes, shared),
            pad_id=llm.pad_id,
            qformer_pad_id=cast(int, (qformer and qformer.pad_token_id) or 0),
        )
        return batch | {"replaced": np.array([attempt for attempt, _ in samples], np.int32)}

    def _check_positions(self, record: Record, example: Example) -> None:
        most, size = self.text.variant.llm.longest_sample, self._size(record, example)
        if most is not None and size["slots"] > most:
            raise ValueError(
                f"it has {size['slots']} slots ({size['images']} images, {size['tokens']} tokens), "
                f"the language model has {most} positions: lower prompt_limit or answer_limit"
            )

    def _size(self, record: Record, example: Example) -> dict[str, int]:
        """Returns the numbers of images, tokens, slots ... of a sample, by name."""
        tokens, count = len(example["tokens"]), len(record.images)
        return {
            "images": count,
            "tokens": tokens,
            "slots": tokens + count * self.text.variant.visual_tokens,
            "qformer_tokens": len(example.get("qformer_tokens", ())),
            "targets": int((example["targets"] != IGNORE).sum()),
        }

    def _lengths(self, sizes: Sequence[Mapping[str, int]], shared: np.ndarray) -> dict[str, int]:
        """Returns the width of the rows of the global batch, the `lengths` of `collate`.

        `sizes` has the `_size` of each sample, `shared` the samples of each row. Widths are rounded
        to few different values, so that few programs are compiled.
        """
        if self.samples_per_row > 1:
            return row_lengths(sizes, shared, self.text.qformer_limit)
        longest = lambda name: bucket(max(s[name] for s in sizes), self.buckets[name], name)
        images = max(1, *(size["images"] for size in sizes))  # texts alone have an unused image
        return {
            "images": images,
            "qformer_tokens": longest("qformer_tokens"),
            "slots": images * self.text.variant.visual_tokens + longest("tokens"),
            "targets": longest("targets"),
        }

    def ids(self, step: int) -> list[str]:
        """Returns the record ids of the global batch `step`, in the mixture's order.

        Replacements of unusable records are not among them.
        """
        first = step * self.batch_size
        return [self.mixture.record(first + row)[1].id for row in range(self.batch_size)]

    def fingerprint(self) -> str:
        """Returns a sha256 of mixture and batch size, which determine the samples of every step.

        A run refuses to resume with another one. Packing is not part of it, since it changes the
        rows of a batch, but not the samples in it.
        """
        chat = [] if self.chat is None else [self.chat.fingerprint(), self.image_order]
        return digest_of([self.mixture.fingerprint(), self.batch_size, *chat])

    def _text(
        self, position: int, attempt: int = 0, room: Example | None = None
    ) -> tuple[int, Record, Example]:
        """Returns (attempt, record, example) of the first usable record for a place of the mixture.

        Attempt 0 is the record at that place; the following attempts are random records of the same
        source. The example has no pixels yet. With `room`, another example, its texts are cut to
        the lengths there.
        """
        while True:
            source, index = self.mixture.find(position, attempt)
            name = f"record {index} of {source.name}"
            try:
                record = source.records[index]
                name = record.id
                if problems := record.text_problems():
                    raise ValueError("; ".join(problems))
                rng = self.mixture.rng(position, attempt, use="text")
                if self.chat is None:
                    prompt, answer = self.mixture.instruct(source, record, rng)
                    example = self.text.example(prompt, answer, room)
                else:
                    talk = self.mixture.converse(source, record, rng, self.image_order)
                    example = self.chat.example(talk, room)
                self._check_positions(record, example)
                return attempt, record, example
            except ValueError as error:
                attempt = self.replacements.next(source, name, attempt, error)

    def _whole(
        self, position: int, attempt: int, record: Record, example: Example
    ) -> tuple[int, Example]:
        """Returns (attempt, example) with pixels; an unreadable image makes another record step in.

        The rows are laid out before any pixels are read, so a replacement must not be longer than
        the `example` it replaces. If `FITTING` replacements are too long, the next one is cut to
        fit.
        """
        room, source = self._size(record, example), self.mixture.find(position)[0]
        limits, passed = example, 0
        while True:
            try:
                return attempt, example | self._visual(record, position, attempt)
            except images.ImageError as error:
                attempt = self.replacements.next(source, record.id, attempt, error)
            attempt, record, example = self._text(position, attempt)
            while not _fits(self._size(record, example), room):
                passed += 1
                if passed > FITTING:
                    attempt, record, example = self._text(position, attempt, limits)
                    kept = record.images[: room["images"]]
                    record = dataclasses.replace(record, images=kept)
                    break
                attempt = self.replacements.next(source, record.id, attempt, _TOO_LONG)
                attempt, record, example = self._text(position, attempt)

    def _visual(self, record: Record, position: int, attempt: int) -> Example:
        """Returns the `images` of an example, or `patches` [n, P, D] where features are read."""
        if self.features is None:
            return {"images": self._pixels(record, position, attempt)}
        read = [self.features.read(source, record.id) for source in record.images]
        empty = np.zeros((0, *self.features.shape), ml_dtypes.bfloat16)
        return {"patches": np.stack(read) if read else empty}

    def _pixels(self, record: Record, position: int, attempt: int) -> np.ndarray:
        """Returns pixels [n, H, W, 3] uint8; all frames of a video get the same random crop."""
        if not record.images:
            return np.zeros((0, self.prepare.size, self.prepare.size, 3), np.uint8)
        rng = lambda: self.mixture.rng(position, attempt, use="image")
        return np.stack([self.prepare(source, rng()) for source in record.images])


class ImagePreparation:
    """Turns an image of a record into the pixels of a training sample.

    It is called with (source, random generator) and returns pixels [size, size, 3] uint8.
    """

    def __init__(
        self,
        size: int,
        augment: bool,
        crop: str,
        min_decode_ratio: float,
        rand_augment: bool,
        upright: bool,
    ):
        """Sets the side of the pixels, `size`; the other arguments are those of `TrainBatches`."""
        self.size, self.augment, self.upright = size, augment, upright
        self.crop = images.CROPS[crop]
        self.min_decode_ratio, self.rand_augment = min_decode_ratio, rand_augment

    def __call__(self, source: images.Source, rng: np.random.Generator) -> np.ndarray:
        """Returns pixels [size, size, 3] uint8; raises ImageError if the image cannot be used."""
        if not self.augment:
            return self.crop(images.decode(source, upright=self.upright), self.size)
        pixels = images.random_resized_crop_flip(
            source, self.size, rng, min_ratio=self.min_decode_ratio, upright=self.upright
        )
        return rand_augment(pixels, rng) if self.rand_augment else pixels


class Replacements:
    """Logs the first `WARNINGS` replaced records; stops the run after `ATTEMPTS` in a row."""

    def __init__(self):
        self._named = 0

    def next(self, source: Source, name: str, attempt: int, error: Exception) -> int:
        """Logs why the record with the id `name` cannot be used; returns `attempt` + 1.

        `attempt` is the number of replacements that were tried before it (`Mixture.record`).

        Raises:
            ValueError: `attempt` has reached `ATTEMPTS`.
        """
        if error is not _TOO_LONG and self._named < WARNINGS:
            self._named += 1
            text = f"{name}: replaced: {error}".encode("utf-8", "backslashreplace").decode()
            logging.getLogger(__name__).warning(text)
        if attempt >= ATTEMPTS:
            raise ValueError(
                f"{ATTEMPTS} records of source {source.name!r} in a row cannot be used, the last "
                f"one being {name!r} ({error}); `jax-instructblip check` lists what is wrong"
            )
        return attempt + 1


# A record that is skipped for this reason is usable, so it is not named in the log.
_TOO_LONG = ValueError("it has more images, or a longer text, than the one that it would replace")


def _fits(size: Mapping[str, int], room: Mapping[str, int]) -> bool:
    return all(size[name] <= room[name] for name in room)


def _limits(text: TextProcessor, chat: ConversationProcessor | None) -> dict[str, int]:
    """Returns the largest number of tokens of each text of a sample, by its key in an example."""
    if chat is not None:
        return {"qformer_tokens": text.qformer_limit, "tokens": chat.limit, "targets": chat.limit}
    limits = {"qformer_tokens": text.qformer_limit, "tokens": text.prompt_limit}
    if text.variant.llm.encoder_decoder:
        return limits | {"targets": text.answer_limit}
    answer = text.answer_limit - 1  # the limit counts one `</s>` that is then dropped
    return limits | {"tokens": text.prompt_limit + answer, "targets": answer}


def _cut(buckets: Sequence[int], limit: int) -> tuple[int, ...]:
    return tuple(sorted({size for size in buckets if size < limit} | {limit}))
