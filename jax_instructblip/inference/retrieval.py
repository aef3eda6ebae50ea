"""Retrieval with BLIP-2's first stage: features, similarities (ITC), and matching (ITM).

    blip = jax_instructblip.load("blip2-itm-vit-g")
    blip.itc(images, texts)                 similarities [N, M]: one pass per image and per text
    blip.itm(images, texts)                 match logits [N, 2] of pairs: one pass per pair
    blip.rank(images, texts, k=128)         both directions: the k nearest by ITC, re-ranked by ITM

The keys and values of an image's patches do not depend on the text, so a re-ranking computes them
once for all texts of an image.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip.data.captions import RETRIEVAL_LIMIT, CaptionTokenizer
from jax_instructblip.fields import check, whole
from jax_instructblip.inference.answers import Answer
from jax_instructblip.inference.batching import Frame, check_batch_size, pixels
from jax_instructblip.inference.captioning import generate_captions
from jax_instructblip.inference.generation_config import GenerationConfig, configured
from jax_instructblip.inference.loading import Source, load_params
from jax_instructblip.models.blip2 import Blip2
from jax_instructblip.models.released import released_name
from jax_instructblip.models.variants import Variant
from jax_instructblip.progress import Progress

IMAGES, TEXTS, PAIRS = 16, 128, 128  # default batch sizes
CANDIDATES = 128  # pairs per image or text that are re-ranked, as released for fine-tuning
ABSENT = -100.0  # score of pairs that were not re-ranked, as released


class Ranking(NamedTuple):
    """Scores of a re-ranking; `ABSENT` for pairs that were not among the k nearest."""

    image_to_text: np.ndarray  # [N, M] float32
    text_to_image: np.ndarray  # [M, N] float32


class Retriever:
    """A model of BLIP-2's first stage: features, similarities, match logits and rankings."""

    def __init__(
        self,
        variant: Variant,
        params: dict[str, Any],
        text: CaptionTokenizer,
        *,
        dtype: Any = jnp.float32,
        silent: bool = False,
        source: Source | None = None,
    ):
        """Takes parameters that are on their device already; `load` reads them from a folder."""
        self.variant, self.params, self.text = variant, params, text
        self.silent, self.source = silent, source  # silent: no progress lines
        self.model = Blip2(variant, jnp.dtype(dtype))
        apply = lambda method: jax.jit(
            lambda params, *each: self.model.apply({"params": params}, *each, method=method)
        )
        self._image_features = apply(_features)
        self._text_features = apply(Blip2.text_features)
        self._encode_image = apply(Blip2.encode_image)
        self._match = apply(Blip2.match_logits)

    @classmethod
    def of(cls, source: Source, dtype: Any, mesh: Any = None) -> "Retriever":
        """Reads the weights of `source` and returns its retriever.

        Raises a ValueError for a `mesh`: this model runs on one device.
        """
        if mesh is not None:
            raise ValueError("a first-stage model works on one device: leave out mesh")
        text = CaptionTokenizer.load(source.folder, source.variant, RETRIEVAL_LIMIT)
        params = load_params(source, dtype)
        return cls(source.variant, params, text, dtype=dtype, source=source)

    def __repr__(self) -> str:
        name = released_name(self.variant) or "a first-stage model of its own size"
        folder = f", {self.source.folder}" if self.source else ""
        return f"{type(self).__name__}({name}, {self.model.dtype}{folder})"

    def image_features(self, images: Sequence[Frame], *, batch_size: int = IMAGES) -> np.ndarray:
        """Normalised features [N, Q, E] float32 of the images: one vector for each query."""
        batches = ((rows, self._pixels(rows)) for rows in _batches(images, batch_size, "images"))
        run = lambda x: self._image_features(self.params, x)
        return self._gather(run, batches, len(images), "looking", "images")

    def text_features(self, texts: Sequence[str], *, batch_size: int = TEXTS) -> np.ndarray:
        """Normalised features [M, E] float32 of the texts."""
        ids, valid, _ = self.text.encode(texts)
        places = _batches(range(len(ids)), batch_size, "texts")
        batches = ((rows, (ids[rows], valid[rows])) for rows in map(list, places))
        run = lambda each: self._text_features(self.params, *each)
        return self._gather(run, batches, len(ids), "reading", "texts")

    def itc(self, images: Sequence[Frame], texts: Sequence[str]) -> np.ndarray:
        """Similarities [N, M] float32: the largest cosine between a text and an image's queries."""
        return similarities(self.image_features(images), self.text_features(texts))

    def itm(
        self, images: Sequence[Frame], texts: Sequence[str], *, batch_size: int = PAIRS
    ) -> np.ndarray:
        """Logits [N, 2] float32 of (no match, match) for image i and text i."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts: give as many of both")
        ids, valid, _ = self.text.encode(texts)
        places = _batches(range(len(ids)), batch_size, "pairs")

        def batches() -> Iterator[tuple[Sequence[int], Any]]:
            for rows in map(list, places):
                shown = self._pixels([images[row] for row in rows])
                yield rows, (self._encode_image(self.params, shown), ids[rows], valid[rows])

        run = lambda each: self._match(self.params, *each)
        return self._gather(run, batches(), len(ids), "matching", "pairs")

    def rank(
        self,
        images: Sequence[Frame],
        texts: Sequence[str],
        *,
        k: int = CANDIDATES,
        itm_only: bool = False,
        batch_size: int = PAIRS,
    ) -> Ranking:
        """Scores of each image's k nearest texts, and of each text's k nearest images.

        A score is the logit of a match plus the similarity, as in LAVIS; with `itm_only` the logit
        alone.

        Raises:
            ValueError: there are no images or texts, or `k` is not a whole number of at least 1.
        """
        check({"k": k}, {"k": whole(1)})
        check_batch_size(batch_size)
        near = self.itc(images, texts)
        nearest = {"image": _nearest(near, k), "text": _nearest(near.T, k)}
        wanted = np.zeros(near.shape, bool)
        np.put_along_axis(wanted, nearest["image"], True, axis=1)
        np.put_along_axis(wanted.T, nearest["text"], True, axis=1)
        scores = self._match_wanted(images, texts, wanted, batch_size)
        if not itm_only:
            scores = scores + near
        return Ranking(_keep(scores, nearest["image"]), _keep(scores.T, nearest["text"]))

    def generate(
        self,
        images: Sequence[Frame],
        config: GenerationConfig | None = None,
        *,
        batch_size: int = IMAGES,
        **settings: Any,
    ) -> list[Answer]:
        """Captions of the images, in order, by the first stage alone (ITG).

        Greedy by default; LAVIS has `num_beams=3, min_new_tokens=9, max_new_tokens=29`.

        Args:
            images: paths, bytes of image files, PIL images or uint8 arrays [H, W, 3].
            config: how to decode (`GenerationConfig` explains all settings).
            batch_size: images that are captioned at once.
            **settings: changes of the config, by name.

        Raises:
            ValueError: the checkpoint has no caption head (Hugging Face's format lacks it), there
                are no images, one of them cannot be used, or a setting is out of its range.
        """
        return generate_captions(
            self.variant,
            self.params,
            self.text,
            images,
            configured(config, settings),
            batch_size=batch_size,
            dtype=self.model.dtype,
            silent=self.silent,
        )

    def _match_wanted(
        self, images: Sequence[Frame], texts: Sequence[str], wanted: np.ndarray, size: int
    ) -> np.ndarray:
        """Match logits [N, M] of the pairs where `wanted` is True, `ABSENT` elsewhere.

        Each image is encoded once, and matched with `size` texts at a time.
        """
        ids, valid, _ = self.text.encode(texts)
        scores = np.full(wanted.shape, ABSENT, np.float32)
        size = min(size, len(ids))
        with Progress(int(wanted.sum()), "matching", "pairs", silent=self.silent) as progress:
            for number, row in enumerate(wanted):
                patches = self._encode_image(self.params, self._pixels([images[number]]))
                chosen = np.flatnonzero(row)
                for start in range(0, len(chosen), size):
                    part = chosen[start : start + size]
                    padded = np.pad(part, (0, size - len(part)), mode="edge")
                    logits = self._match(self.params, patches, ids[padded], valid[padded])
                    scores[number, part] = np.asarray(logits)[: len(part), 1]
                    progress.update(len(part))
        return scores

    def _pixels(self, images: Sequence[Frame]) -> np.ndarray:
        return pixels(list(images), self.variant.vision.image_size)

    def _gather(
        self,
        run: Callable[[Any], jax.Array],
        batches: Iterator[tuple[Sequence[Any], Any]],
        count: int,
        label: str,
        unit: str,
    ) -> np.ndarray:
        """Concatenates the results of `run` on all batches, the padding of the last one removed."""
        found, size = [], 0
        with Progress(count, label, unit, compiles=True, silent=self.silent) as progress:
            for rows, batch in batches:
                size = size or len(rows)
                padded = jax.tree.map(lambda leaf, n=size: _pad(leaf, n), batch)
                found.append(np.asarray(run(padded), np.float32)[: len(rows)])
                progress.update(len(rows))
        return np.concatenate(found)


def _features(model: Blip2, images: jax.Array) -> jax.Array:
    return model.image_features(model.encode_image(images))[0]


def similarities(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Similarities [N, M] of images [N, Q, E] and texts [M, E]: the largest cosine over queries."""
    return np.stack([(image @ texts.T).max(axis=0) for image in images])


def _batches(items: Sequence[Any], size: int, unit: str) -> Iterator[Sequence[Any]]:
    check_batch_size(size)
    if not len(items):
        raise ValueError(f"there are no {unit}")
    return (items[start : start + size] for start in range(0, len(items), size))


def _pad(leaf: Any, size: int) -> Any:
    """Appends copies of the last row to `leaf`, so that it has `size` rows."""
    lacking = size - leaf.shape[0]
    return leaf if not lacking else jnp.concatenate([leaf, *[leaf[-1:]] * lacking])


def _nearest(scores: np.ndarray, k: int) -> np.ndarray:
    """Column indices [R, min(k, C)] of each row's highest scores; of equal scores the first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _keep(scores: np.ndarray, columns: np.ndarray) -> np.ndarray:
    kept = np.full(scores.shape, ABSENT, np.float32)
    np.put_along_axis(kept, columns, np.take_along_axis(scores, columns, axis=1), axis=1)
    return kept
