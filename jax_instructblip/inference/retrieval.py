"""Retrieval with BLIP-2's first stage: features, similarities (ITC), and matching (ITM).

    blip = jax_instructblip.load("blip2-itm-vit-g")
    blip.itc(images, texts)                 similarities [N, M], cheap: one pass an image and a text
    blip.itm(images, texts)                 match logits [N, 2] of pairs, one pass a pair
    blip.rank(images, texts, k=128)         both ways: the k nearest by ITC, re-ranked by ITM

Features come in three forms, of Q queries an image and of the [CLS] of a text:

    form          image_features   text_features
    "raw"         [N, Q, D]        [M, D]          outputs of the Q-Former (D 768)
    "projected"   [N, Q, E]        [M, E]          in the space that both share (E 256)
    "normalised"  [N, Q, E]        [M, E]          the same, of length 1: a product is a cosine

The keys and values of an image's patches do not depend on the text: a re-ranking computes them once
an image. On a mesh rows are split over the devices of `data` and `fsdp`.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_instructblip.data.captions import RETRIEVAL_LIMIT, CaptionTokenizer
from jax_instructblip.fields import check, flag, one_of, whole
from jax_instructblip.inference import matching
from jax_instructblip.inference import retrieval_programs as programs
from jax_instructblip.inference.answers import Answer
from jax_instructblip.inference.batching import (
    Frame,
    check_batch_size,
    check_images_listed,
    pixels,
)
from jax_instructblip.inference.captioning import generate_captions
from jax_instructblip.inference.feature_forms import FORMS
from jax_instructblip.inference.generation_config import GenerationConfig, configured
from jax_instructblip.inference.loading import Source, describe_dtype, load_params
from jax_instructblip.inference.matching import ABSENT as ABSENT
from jax_instructblip.inference.named_methods import NamedMethods
from jax_instructblip.inference.streaming import one_ahead
from jax_instructblip.models.blip2 import Blip2
from jax_instructblip.models.layers import BATCH_AXES
from jax_instructblip.models.quantise import form_of
from jax_instructblip.models.released import released_name
from jax_instructblip.models.variants import Variant
from jax_instructblip.parallel.mesh import batch_sharding, replicated
from jax_instructblip.progress import Progress

IMAGES, TEXTS, PAIRS = 16, 128, 128  # at once; in `match` on each device, else on all together
CANDIDATES = 128  # re-ranked for each query, as released for retrieval fine-tuning


class Ranking(NamedTuple):
    """Scores of a re-ranking; `ABSENT` for pairs that were not among the k nearest."""

    image_to_text: np.ndarray  # [N, M] float32
    text_to_image: np.ndarray  # [M, N] float32


class Retriever(NamedMethods):
    """A model of BLIP-2's first stage: features, similarities, match logits and rankings.

    Images are paths, bytes of image files, PIL images or uint8 arrays `[H, W, 3]`. `batch_size` is
    the number of images, texts or pairs at once, on all devices together unless said otherwise.
    """

    elsewhere = "A model with a language model answers: BLIP-2's second stage, InstructBLIP, LLaVA"

    def __init__(
        self,
        variant: Variant,
        params: dict[str, Any],
        text: CaptionTokenizer,
        *,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        silent: bool = False,
        source: Source | None = None,
    ):
        """A retriever from parameters that are on their devices; `load` makes one from a folder."""
        self.variant, self.params, self.text, self.mesh = variant, params, text, mesh
        self.silent, self.source = silent, source  # silent: no progress lines
        self.model = Blip2(variant, jnp.dtype(dtype))
        apply = lambda method: jax.jit(
            lambda params, *each: self.model.apply({"params": params}, *each, method=method)
        )
        self._image_features = {
            form: apply(functools.partial(programs.features_of_images, form=form)) for form in FORMS
        }
        self._text_features = {
            form: apply(functools.partial(programs.features_of_texts, form=form)) for form in FORMS
        }
        self._pair_features = apply(programs.features_of_pairs)
        self._pair_logits = apply(programs.match_images)
        self._image_kv = apply(programs.kv_of_images)
        self._match = apply(programs.match_kv)
        self._near = jax.jit(programs.similarities)

    @classmethod
    def of(
        cls, source: Source, dtype: Any, mesh: Mesh | None = None, quantise: str | None = None
    ) -> "Retriever":
        """The retriever of a `source` from `read_source`; other arguments are as in `load_params`.

        Raises:
            ValueError: `mesh` is of several processes; a retriever works on the devices of one.
        """
        if mesh is not None and getattr(mesh, "is_multi_process", False):
            raise ValueError(
                "a first-stage model works on the devices of one process: give a mesh of "
                "jax.local_devices()"
            )
        text = CaptionTokenizer.load(source.folder, source.variant, RETRIEVAL_LIMIT)
        params = load_params(source, dtype, mesh, quantise)
        return cls(source.variant, params, text, dtype=dtype, mesh=mesh, source=source)

    def __repr__(self) -> str:
        name = released_name(self.variant) or "a first-stage model of its own size"
        folder = f", {self.source.folder}" if self.source else ""
        dtype = describe_dtype(self.model.dtype, form_of(self.params))
        return f"{type(self).__name__}({name}, {dtype}{folder})"

    def image_features(
        self, images: Sequence[Frame], *, form: str = "normalised", batch_size: int = IMAGES
    ) -> np.ndarray:
        """Float32 features `[N, Q, E]` of images, `[N, Q, D]` if raw; see the module for `form`."""
        check({"form": form}, {"form": one_of(*FORMS)})
        check_images_listed(images)
        batches = ((rows, self._pixels(rows)) for rows in _batches(images, batch_size, "images"))
        return self._gather(
            self._image_features[form], batches, len(images), batch_size, "looking", "images"
        )

    def text_features(
        self, texts: Sequence[str], *, form: str = "normalised", batch_size: int = TEXTS
    ) -> np.ndarray:
        """Float32 features `[M, E]` of texts, `[M, D]` if raw; see the module for `form`."""
        check({"form": form}, {"form": one_of(*FORMS)})
        ids, valid, _ = self.text.encode(texts)
        parts = _batches(range(len(ids)), batch_size, "texts")
        batches = ((rows, (ids[rows], valid[rows])) for rows in map(list, parts))
        run = lambda params, each: self._text_features[form](params, *each)
        return self._gather(run, batches, len(ids), batch_size, "reading", "texts")

    def pair_features(
        self, images: Sequence[Frame], texts: Sequence[str], *, batch_size: int = PAIRS
    ) -> np.ndarray:
        """Raw float32 features `[N, Q, D]` of pairs: image i together with text i."""
        return self._of_pairs(self._pair_features, images, texts, batch_size)

    def itc(self, images: Sequence[Frame], texts: Sequence[str]) -> np.ndarray:
        """Similarities `[N, M]` float32: cosines of each text and each image's nearest query."""
        self.text.encode(texts)  # what is no text is told before images are looked at
        return self.similarities(self.image_features(images), self.text_features(texts))

    def similarities(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """The result of `itc` from normalised features of images `[N, Q, E]` and texts `[M, E]`."""
        texts = self._on_devices(np.asarray(texts, np.float32), whole=True)
        parts = _batches(np.asarray(images, np.float32), IMAGES, "images")
        run = lambda _, part: self._near(part, texts)
        return self._gather(
            run, ((part, part) for part in parts), len(images), IMAGES, "comparing", "images"
        )

    def itm(
        self, images: Sequence[Frame], texts: Sequence[str], *, batch_size: int = PAIRS
    ) -> np.ndarray:
        """Float32 logits `[N, 2]` of (no match, match) of pairs: image i with text i."""
        return self._of_pairs(self._pair_logits, images, texts, batch_size)

    def rank(
        self,
        images: Sequence[Frame],
        texts: Sequence[str],
        *,
        k: int = CANDIDATES,
        itm_only: bool = False,
        batch_size: int = PAIRS,
        near: np.ndarray | None = None,
    ) -> Ranking:
        """Scores of each image's k nearest texts, and of each text's k nearest images.

        A score is the logit of the match plus the similarity, as released; with `itm_only` the
        logit alone. If several candidates are equally near, the first of them are taken.

        Args:
          images: paths, bytes of image files, PIL images or uint8 arrays `[H, W, 3]`.
          texts: texts, each compared with each image.
          k: candidates that are re-ranked; all of them where there are fewer.
          itm_only: True leaves out the similarity.
          batch_size: pairs that are matched at once, on each device.
          near: similarities `[N, M]` that `itc` has returned; None computes them.

        Raises:
            ValueError: there are no images or texts, or `k` is not a whole number of at least 1.
        """
        check({"k": k, "itm_only": itm_only}, {"k": whole(1), "itm_only": flag()})
        check_batch_size(batch_size)
        if near is None:
            near = self.itc(images, texts)
        of_images, of_texts = matching.nearest(near, k), matching.nearest(near.T, k)
        matches = np.full(near.shape, ABSENT, np.float32)
        chosen = matching.pairs(of_images, of_texts)

        def take(number: int, logits: np.ndarray) -> None:
            matches[number, chosen[number]] = logits

        self.match(images, texts, chosen, take, batch_size=batch_size)

        def ranked(columns: np.ndarray, near: np.ndarray, matches: np.ndarray) -> np.ndarray:
            own, logits = (np.take_along_axis(each, columns, axis=1) for each in (near, matches))
            return matching.spread(matching.rerank(columns, own, logits, itm_only), near.shape[1])

        return Ranking(ranked(of_images, near, matches), ranked(of_texts, near.T, matches.T))

    def generate(
        self,
        images: Sequence[Frame],
        config: GenerationConfig | None = None,
        *,
        batch_size: int = IMAGES,
        **settings: Any,
    ) -> list[Answer]:
        """Captions of the images, in order, by the first stage alone (ITG).

        Greedy by default; LAVIS has `num_beams=3, min_new_tokens=9, max_new_tokens=29,
        length_rule="transformers4.26"`.

        Args:
            images: paths, bytes of image files, PIL images or uint8 arrays `[H, W, 3]`.
            config: how to decode (`GenerationConfig` explains all settings).
            batch_size: images that are captioned at once.
            **settings: changes of the config, by name.

        Raises:
            ValueError: the checkpoint has no caption head (Hugging Face's format lacks it), there
                are no images, one of them cannot be used, or a setting is out of its range.
        """
        with self._mesh():
            return generate_captions(
                self.variant,
                self.params,
                self.text,
                images,
                configured(config, settings),
                batch_size=batch_size,
                dtype=self.model.dtype,
                silent=self.silent,
                on_devices=self._on_devices,
                multiple=self.batch_shards,
            )

    def match(
        self,
        images: Sequence[Frame],
        texts: Sequence[str],
        chosen: Sequence[np.ndarray],
        take: Callable[[int, np.ndarray], None],
        *,
        numbers: Sequence[int] | None = None,
        batch_size: int = PAIRS,
        done: int = 0,
    ) -> None:
        """Matches each image with its chosen texts; hands the logits `[t]` of "match" to `take`.

        Args:
          images: all images; those in `numbers` are opened, a few at a time.
          texts: all texts.
          chosen: for each of all images the numbers `[t]` of the texts that it is matched with.
          take: called with the number of an image and its float32 logits when these are complete.
          numbers: the images that are matched; by default all.
          batch_size: pairs that are matched at once, on each device.
          done: the number of pairs that were matched before, for the progress line.
        """
        check_batch_size(batch_size)
        ids, valid, _ = self.text.encode(texts)
        numbers = range(len(images)) if numbers is None else numbers
        counts = [len(chosen[number]) for number in numbers]
        size = matching.block_size(counts, batch_size)
        groups = max(1, batch_size // size) * self.batch_shards  # blocks at once
        total = sum(counts) + done
        line = Progress(total, "matching", "pairs", done=done, compiles=True, silent=self.silent)
        pending = self._blocks(images, chosen, numbers, size, groups, ids, valid)
        parts: dict[int, list[np.ndarray]] = {}
        with self._mesh(), line as progress:
            for blocks, logits in one_ahead(pending):
                scores = np.asarray(logits, np.float32)[:, 1].reshape(groups, size)
                for block, row in zip(blocks, scores, strict=False):
                    part = parts.setdefault(block.image, [])
                    part.append(row[: len(block.texts)])
                    if sum(map(len, part)) == len(chosen[block.image]):
                        take(block.image, np.concatenate(parts.pop(block.image)))
                progress.update(sum(len(block.texts) for block in blocks))

    def _blocks(
        self,
        images: Sequence[Frame],
        chosen: Sequence[np.ndarray],
        numbers: Sequence[int],
        size: int,
        groups: int,
        ids: np.ndarray,
        valid: np.ndarray,
    ) -> Iterator[tuple[list[matching.Block], jax.Array]]:
        """Blocks and their logits; an image's keys and values are computed once.

        `size` is the texts of a block, `groups` the blocks at once.
        """
        at_once = IMAGES * self.batch_shards
        for start in range(0, len(numbers), at_once):
            some = list(numbers[start : start + at_once])
            shown = _pad(self._pixels([images[number] for number in some]), at_once)
            kv = self._image_kv(self.params, self._on_devices(shown))
            blocks = list(matching.plan_blocks(some, chosen, size))
            for first in range(0, len(blocks), groups):
                part = blocks[first : first + groups]
                index = np.array([some.index(block.image) for block in part], np.int32)
                rows = np.stack([_pad(block.texts, size) for block in part])
                rows = _pad(rows, groups).reshape(-1)
                given = (_pad(index, groups), ids[rows], valid[rows])
                yield part, self._match(self.params, kv, *map(self._on_devices, given))

    def _of_pairs(
        self, run: Callable[..., Any], images: Sequence[Frame], texts: Sequence[str], size: int
    ) -> np.ndarray:
        check_images_listed(images)
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts: give as many of both")
        ids, valid, _ = self.text.encode(texts)
        parts = map(list, _batches(range(len(ids)), size, "pairs"))
        batches = (
            (rows, (self._pixels([images[row] for row in rows]), ids[rows], valid[rows]))
            for rows in parts
        )
        call = lambda params, each: run(params, *each)
        return self._gather(call, batches, len(ids), size, "matching", "pairs")

    def _pixels(self, images: Sequence[Frame]) -> np.ndarray:
        return pixels(list(images), self.variant.vision.image_size)

    def _gather(
        self,
        run: Callable[[Any, Any], jax.Array],
        batches: Iterator[tuple[Sequence[Any], Any]],
        count: int,
        size: int,
        label: str,
        unit: str,
    ) -> np.ndarray:
        """The results of all batches, the last one padded to the size of the others.

        The images of a batch are opened while the devices compute the one before.
        """
        size = min(size, count)
        size += -size % self.batch_shards
        pad = lambda leaf: self._on_devices(_pad(leaf, size))
        results = []
        line = Progress(count, label, unit, compiles=True, silent=self.silent)
        pending = ((len(rows), run(self.params, jax.tree.map(pad, each))) for rows, each in batches)
        with self._mesh(), line as progress:
            for rows, result in one_ahead(pending):
                results.append(np.asarray(result, np.float32)[:rows])
                progress.update(rows)
        return np.concatenate(results)

    @property
    def batch_shards(self) -> int:
        """The number of shards that the devices split a batch into."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def _mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _on_devices(self, leaf: np.ndarray, whole: bool = False) -> Any:
        """The array on the devices: split by rows, or with `whole` a copy on each."""
        if self.mesh is None:
            return leaf
        return jax.device_put(leaf, (replicated if whole else batch_sharding)(self.mesh))


def _batches(items: Any, size: int, unit: str) -> Iterator[Sequence[Any]]:
    check_batch_size(size)
    if not len(items):
        raise ValueError(f"there are no {unit}: give at least one")
    return (items[start : start + size] for start in range(0, len(items), size))


def _pad(leaf: np.ndarray, size: int) -> np.ndarray:
    """The array with its last row repeated until it has `size` rows."""
    lacking = size - leaf.shape[0]
    return leaf if not lacking else np.concatenate([leaf, np.repeat(leaf[-1:], lacking, axis=0)])
