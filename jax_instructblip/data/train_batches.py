"""Batches of training samples: the text of a sample, its tokens and pixels, rows of one shape.

Batch s holds the samples s x B ... (s + 1) x B - 1 of the mixture, whatever was read before. So a
run resumes at any step, on any number of hosts, with the same samples; a host reads only its own
rows of each *global* batch. (Slicing the mixture by host would alias with its periodic pattern.)

    sample k --mixture--> record --template--> prompt, answer --tokens, pixels--> example --> batch
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from jax_instructblip.data import images
from jax_instructblip.data.batch import bucket, collate, deal, round_up
from jax_instructblip.data.mixture import Mixture, Source, digest_of
from jax_instructblip.data.rand_augment import rand_augment
from jax_instructblip.data.records import Record
from jax_instructblip.data.spec import IGNORE, Batch
from jax_instructblip.data.text import TextProcessor

ATTEMPTS = 100  # replacements tried for one sample before the run stops
FITTING = 20  # replacements passed over for their length before one is cut
WARNINGS = 10  # replaced samples that are named one by one

Example = dict[str, np.ndarray]


class TrainBatches:
    """Random access to batches: `batches[s]` holds this host's rows of the global batch s.

    Besides the keys of a training batch it has, for each sample of these rows in turn, `truncated`
    [b, 3], and `replaced` [b], int32: how many unusable records were passed over before it.
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
        min_decode_ratio: float = 0.0,
        rand_augment: bool = False,
        upright: bool = True,
        rows: np.ndarray | None = None,
    ):
        """`batch_size` samples make a global batch; `rows` are the numbers of this host's rows.

        With one sample a row, texts are padded to the smallest of `buckets` that holds the longest
        one of the *global* batch, or else to the text's limit. Rows of several are as wide as the
        widest of the batch, rounded up (`round_up`). Rows with fewer images than others get black
        ones that nothing sees. `augment` crops and mirrors; without, the whole image is squashed to
        the model's size (mirrored images would spoil reading, left and right). `min_decode_ratio`
        is the `min_ratio` of `images.random_resized_crop_flip`, whose pixels `rand_augment`
        changes further; `upright` is as in `images.decode`.

        Raises:
            ValueError: `samples_per_row` does not divide the batch.
        """
        if samples_per_row < 1 or batch_size % samples_per_row:
            raise ValueError(
                f"{samples_per_row} samples a row do not divide a batch of {batch_size}"
            )
        self.mixture, self.text = mixture, text
        self.batch_size, self.steps = batch_size, steps
        self.samples_per_row, self.row_count = samples_per_row, batch_size // samples_per_row
        size = text.variant.vision.image_size
        self.prepare = ImagePreparation(size, augment, min_decode_ratio, rand_augment, upright)
        self.rows = np.arange(self.row_count) if rows is None else rows
        self.buckets = {name: _cut(buckets, limit) for name, limit in _limits(text).items()}
        self.replacements = Replacements()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        first = step * self.batch_size
        # Looked at by all hosts, the texts of all samples tell each who shares a row, and its size.
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
        most, size = self.text.variant.llm.max_positions, self._size(record, example)
        if most is not None and size["slots"] > most:
            raise ValueError(
                f"it has {size['slots']} slots ({size['images']} images, {size['tokens']} tokens), "
                f"the language model has {most} positions: lower prompt_limit or answer_limit"
            )

    def _size(self, record: Record, example: Example) -> dict[str, int]:
        """The room that a sample takes in a row, by kind."""
        tokens, count = len(example["tokens"]), len(record.images)
        return {
            "images": count,
            "tokens": tokens,
            "slots": tokens + count * self.text.variant.visual_tokens,
            "qformer_tokens": len(example.get("qformer_tokens", ())),
            "targets": int((example["targets"] != IGNORE).sum()),
        }

    def _lengths(self, sizes: Sequence[Mapping[str, int]], shared: np.ndarray) -> dict[str, int]:
        """The width of all rows of the global batch; a few widths, so that programs are few."""
        sums = {
            name: max(sum(sizes[sample][name] for sample in row) for row in shared)
            for name in ("images", "slots", "targets")
        }
        longest = lambda name: bucket(max(s[name] for s in sizes), self.buckets[name], name)
        lengths = {"images": sums["images"], "qformer_tokens": longest("qformer_tokens")}
        if self.samples_per_row > 1:
            return lengths | {name: round_up(sums[name]) for name in ("slots", "targets")}
        visual = sums["images"] * self.text.variant.visual_tokens
        return lengths | {"slots": visual + longest("tokens"), "targets": longest("targets")}

    def ids(self, step: int) -> list[str]:
        """The ids of the records of the global batch `step`."""
        first = step * self.batch_size
        return [self.mixture.record(first + row)[1].id for row in range(self.batch_size)]

    def fingerprint(self) -> str:
        """A sha256 of mixture and batch size: with another one a step would hold other samples.

        Who shares a row is no part of it: that changes no sample.
        """
        return digest_of([self.mixture.fingerprint(), self.batch_size])

    def _text(
        self, position: int, attempt: int = 0, room: Example | None = None
    ) -> tuple[int, Record, Example]:
        """The first attempt whose text can be used, its record, its tokens cut to `room`."""
        while True:
            source, index = self.mixture.find(position, attempt)
            name = f"record {index} of {source.name}"
            try:
                record = source.records[index]
                name = record.id
                if problems := record.text_problems():
                    raise ValueError("; ".join(problems))
                rng = self.mixture.rng(position, attempt, use="text")
                prompt, answer = self.mixture.instruct(source, record, rng)
                example = self.text.example(prompt, answer, room)
                self._check_positions(record, example)
                return attempt, record, example
            except ValueError as error:
                attempt = self.replacements.next(source, name, attempt, error)

    def _whole(
        self, position: int, attempt: int, record: Record, example: Example
    ) -> tuple[int, Example]:
        """The example with its pixels; where they cannot be read, another one in its room.

        Rows are laid out before pixels are read, so nothing of the other may be longer. Where none
        of `FITTING` others is as short, the next one is cut.
        """
        room, source = self._size(record, example), self.mixture.find(position)[0]
        limits, passed = example, 0
        while True:
            try:
                return attempt, example | {"images": self._pixels(record, position, attempt)}
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

    def _pixels(self, record: Record, position: int, attempt: int) -> np.ndarray:
        """Pixels [n, H, W, 3]; a video is cropped alike throughout: the same numbers every time."""
        rng = lambda: self.mixture.rng(position, attempt, use="image")
        return np.stack([self.prepare(source, rng()) for source in record.images])


class ImagePreparation:
    """The way from an image of a record to the pixels of a training sample."""

    def __init__(
        self, size: int, augment: bool, min_decode_ratio: float, rand_augment: bool, upright: bool
    ):
        """`size` is that of the sides; the others are the arguments of `TrainBatches`."""
        self.size, self.augment, self.upright = size, augment, upright
        self.min_decode_ratio, self.rand_augment = min_decode_ratio, rand_augment

    def __call__(self, source: images.Source, rng: np.random.Generator) -> np.ndarray:
        """Pixels [size, size, 3], uint8; raises ImageError."""
        if not self.augment:
            return images.resize_squash(images.decode(source, upright=self.upright), self.size)
        pixels = images.random_resized_crop_flip(
            source, self.size, rng, min_ratio=self.min_decode_ratio, upright=self.upright
        )
        return rand_augment(pixels, rng) if self.rand_augment else pixels


class Replacements:
    """A count of unusable records, of which the first few are named in the log."""

    def __init__(self):
        self._named = 0

    def next(self, source: Source, name: str, attempt: int, error: Exception) -> int:
        """The number of the attempt after the one that failed; ValueError after too many."""
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


# Records that are passed over so are usable, and are not named one by one.
_TOO_LONG = ValueError("it has more images, or a longer text, than the one that it would replace")


def _fits(size: Mapping[str, int], room: Mapping[str, int]) -> bool:
    return all(size[name] <= room[name] for name in room)


def _limits(text: TextProcessor) -> dict[str, int]:
    """The most tokens of the texts of a sample."""
    limits = {"qformer_tokens": text.qformer_limit, "tokens": text.prompt_limit}
    if text.variant.llm.encoder_decoder:
        return limits | {"targets": text.answer_limit}
    answer = text.answer_limit - 1  # of which the first, which is dropped, is counted
    return limits | {"tokens": text.prompt_limit + answer, "targets": answer}


def _cut(buckets: Sequence[int], limit: int) -> tuple[int, ...]:
    return tuple(sorted({size for size in buckets if size < limit} | {limit}))
