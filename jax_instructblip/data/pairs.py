"""Batches of image and caption pairs, for the first stage of BLIP-2.

    sample k --mixture--> record --one of its captions--> ids [L]
                          record --its image--> pixels

With B pairs a batch, batch s holds the samples s x B ... (s + 1) x B - 1 of the mixture; a host
makes only its own rows. The keys:

    images        [B, 1, H, W, 3] uint8
    captions      [B, L] int32           `[CLS] ... [SEP]`, padded
    caption_mask  [B, L] bool            True where there is a token
    image_id      [B] int32              equal for equal images
"""

import hashlib
import os

import numpy as np
from PIL import Image

from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.images import ImageError, content_digest
from jax_instructblip.data.mixture import Mixture, digest_of
from jax_instructblip.data.records import Record
from jax_instructblip.data.train_batches import ImagePreparation, Replacements

PairBatch = dict[str, np.ndarray]


class PairBatches:
    """Random access to batches of pairs: `batches[s]` holds this host's rows of the global batch s.

    Besides the keys listed at the top of this file a batch has, for each of its b pairs,
    `truncated` [b, 3] (column 0 is 1 where the caption was cut, the others are 0) and `replaced`
    [b] (the number of unusable records that were skipped before a usable one was found); both
    int32.
    """

    def __init__(
        self,
        mixture: Mixture,
        text: CaptionTokenizer,
        *,
        batch_size: int,
        steps: int,
        augment: bool = True,
        crop: str = "squash",
        min_decode_ratio: float = 0.0,
        rand_augment: bool = False,
        upright: bool = True,
        rows: np.ndarray | None = None,
    ):
        """Takes arguments of the same names and meanings as `TrainBatches`.

        Raises:
            ValueError: the batch has a single pair; the contrastive loss needs others to compare it
                with.
        """
        if batch_size < 2:
            raise ValueError(
                "config.data.batch_size is 1: a pair is compared with the others of its batch, of "
                "which there are none; take at least 2"
            )
        self.mixture, self.text = mixture, text
        self.batch_size, self.steps, self.row_count = batch_size, steps, batch_size
        size = text.variant.vision.image_size
        self.prepare = ImagePreparation(
            size, augment, crop, min_decode_ratio, rand_augment, upright
        )
        self.rows = np.arange(batch_size) if rows is None else rows
        self.replacements = Replacements()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> PairBatch:
        pairs = [self._pair(step * self.batch_size + int(row)) for row in self.rows]
        captions, valid, cut = self.text.encode([caption for _, caption, _, _ in pairs])
        none = np.zeros_like(cut)
        return {
            "images": np.stack([pixels for _, _, pixels, _ in pairs])[:, None],
            "captions": captions,
            "caption_mask": valid,
            "image_id": np.array([image_id(record) for record, _, _, _ in pairs], np.int32),
            "truncated": np.stack([cut, none, none], axis=1).astype(np.int32),
            "replaced": np.array([attempt for _, _, _, attempt in pairs], np.int32),
        }

    def ids(self, step: int) -> list[str]:
        """Returns the record ids of the global batch `step`; replacements are not among them."""
        first = step * self.batch_size
        return [self.mixture.record(first + row)[1].id for row in range(self.batch_size)]

    def fingerprint(self) -> str:
        """Returns a sha256 of mixture and batch size, which determine the pairs of every step.

        A run refuses to resume with another one.
        """
        return digest_of([self.mixture.fingerprint(), self.batch_size])

    def _pair(self, place: int) -> tuple[Record, str, np.ndarray, int]:
        """Returns (record, caption, pixels, attempt) of the first usable record for that place.

        Attempt 0 is the record at that place of the mixture; the following ones are random records
        of the same source.
        """
        attempt = 0
        while True:
            source, index = self.mixture.find(place, attempt)
            name = f"record {index} of {source.name}"
            try:
                record = source.records[index]
                name = record.id
                if problems := pair_problems(record):
                    raise ValueError("; ".join(problems))
                caption = self._caption(record, self.mixture.rng(place, attempt, use="text"))
                rng = self.mixture.rng(place, attempt, use="image")
                return record, caption, self.prepare(record.images[0], rng), attempt
            except (ValueError, ImageError) as error:
                attempt = self.replacements.next(source, name, attempt, error)

    def _caption(self, record: Record, rng: np.random.Generator) -> str:
        """Returns one of the record's distinct captions, drawn evenly, in the mixture's text style.

        Raises:
            ValueError: the style leaves nothing of the caption.
        """
        distinct = tuple(dict.fromkeys(record.answers))
        return self.mixture.style.training_caption(distinct[int(rng.integers(len(distinct)))])


def pair_problems(record: Record) -> list[str]:
    """Returns the reasons why a record is no pair: its texts, its images, or no caption."""
    problems = record.text_problems()
    if not record.answers:
        problems.append("it has no caption (answer)")
    if len(record.images) != 1:
        problems.append(f"it has {len(record.images)} images, a pair has one")
    return problems


def image_id(record: Record) -> int:
    """Returns an int32 hash of the record's image (of its bytes, or of its path).

    Captions of one image share it, so that the contrastive loss does not take them for negatives.
    """
    image = record.images[0]
    if isinstance(image, Image.Image):
        content = content_digest(image)
    else:
        content = image if isinstance(image, bytes) else os.fsencode(str(image))
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "little", signed=True)
