"""The objective of BLIP-2's first stage: contrast (ITC), match (ITM) and caption (ITG) of pairs.

    similarities [B, B] of the whole batch --cross-entropy with the own pair--> ITC
                                           --draw a hard negative a row--> 3 B pairs --match--> ITM
    captions behind the queries of the ITC pass --cross-entropy--> ITG

The three are added with equal weights. Every similarity is of the *global* batch; the features that
a row is compared with carry no gradient, as those that the released code gathers.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from jax_instructblip.data.spec import IGNORE
from jax_instructblip.models.blip2 import Blip2, begin_caption, image_to_text, text_to_image
from jax_instructblip.models.layers import constrain
from jax_instructblip.training.loss import count_targets, cross_entropy
from jax_instructblip.training.objective import Metrics, Totals

SMOOTHING = 0.1  # of the targets of ITC and ITG
NEVER = -10_000.0  # similarity of what is no negative

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class PairObjective:
    """ITC + ITM + ITG of images and captions: `images`, `captions`, `caption_mask`, `image_id`.

    Attributes:
      model: what is trained.
      by_image: whether all captions of an image are right for it (`image_id` tells; fine-tuning for
        retrieval) or its own alone.
    """

    model: Blip2
    by_image: bool = False
    whole_batch: str = "each pair is compared with all others of the batch"

    def totals(self, batch: Batch) -> Totals:
        """`pairs`: how many there are; `tokens`: how many of their captions are to be told."""
        pairs = jnp.asarray(batch["captions"].shape[0], jnp.float32)
        return {"pairs": pairs, "tokens": count_targets(_targets(batch))}

    def __call__(
        self, params: Any, batch: Batch, rng: Array, totals: Totals
    ) -> tuple[Array, Metrics]:
        """The loss, and its terms `itc`, `itm` and `itg`."""
        dropout, key = jax.random.split(rng)
        sums = cast(
            Metrics,
            self.model.apply(
                {"params": params},
                batch,
                key,
                by_image=self.by_image,
                rngs={"dropout": dropout},
                method=pair_terms,
            ),
        )
        terms = {
            "itc": sums["itc"] / totals["pairs"],
            "itm": sums["itm"] / (3 * totals["pairs"]),
            "itg": sums["itg"] / jnp.maximum(totals["tokens"], 1.0),
        }
        return terms["itc"] + terms["itm"] + terms["itg"], terms


def pair_terms(
    model: Blip2, batch: Batch, key: Array, *, by_image: bool = False, train: bool = True
) -> Metrics:
    """Sums of the three terms over the batch; `key` draws the negatives.

    Where the batch has them already (`negative_images`, `negative_texts` [B]) none are drawn.
    """
    tokens, valid = batch["captions"], batch["caption_mask"]
    patches = model.encode_image(batch["images"][:, 0])
    images, kv = model.image_features(patches, train, return_kv=True)
    texts = model.text_features(tokens, valid, train)
    by_row = (
        image_to_text(images, jax.lax.stop_gradient(texts)) / model.temperature(),
        text_to_image(texts, jax.lax.stop_gradient(images)) / model.temperature(),
    )
    same = same_pairs(batch["image_id"] if by_image else jnp.arange(len(tokens)))
    itc = sum(_contrast(each, same) for each in by_row) / 2

    drawn = draw_negatives(key, by_row, same)
    texts_of, images_of = (
        batch.get(name, draw)
        for name, draw in zip(("negative_texts", "negative_images"), drawn, strict=True)
    )
    logits = match_triples(model, patches, tokens, valid, images_of, texts_of, train)
    itm = cross_entropy(logits, jnp.broadcast_to(jnp.array([[1, 0, 0]]), logits.shape[:2]))

    written = begin_caption(tokens, model.variant.qformer.vocab)
    told = model.caption_logits(written, valid, kv, train)
    itg = cross_entropy(told[:, :-1], _targets(batch), SMOOTHING)
    return {"itc": jnp.asarray(itc), "itm": itm, "itg": itg}


def same_pairs(ids: Array) -> Array:
    """Mask [B, B]: pairs of the same image, each with itself at least."""
    return constrain(ids[:, None] == ids[None, :])


def draw_negatives(key: Array, by_row: tuple[Array, Array], same: Array) -> tuple[Array, Array]:
    """The text [B] that is drawn for each image, and the image [B] for each text.

    The more alike, the likelier; never a pair of `same` unless all are. `by_row` are similarities
    of images to texts and of texts to images, each [B, B] and divided by the temperature.
    """
    keys = jax.random.split(key)
    weights = (jnp.where(same, NEVER, jax.lax.stop_gradient(each)) for each in by_row)
    drawn = (jax.random.categorical(k, each) for k, each in zip(keys, weights, strict=True))
    texts, images = drawn
    return texts, images


def match_triples(
    model: Blip2,
    patches: Array,
    tokens: Array,
    valid: Array,
    images_of: Array,
    texts_of: Array,
    train: bool,
) -> Array:
    """Match logits [B, 3, 2] of each pair, of another image with its text, of another text with it.

    The three of a pair stand beside each other, so that no row moves to another device.
    """
    three = lambda *each: jnp.stack(each, axis=1).reshape(-1, *each[0].shape[1:])
    logits = model.match_logits(
        three(patches, patches[images_of], patches),
        three(tokens, tokens, tokens[texts_of]),
        three(valid, valid, valid[texts_of]),
        train,
    )
    return logits.reshape(-1, 3, 2)


def _contrast(similarities: Array, same: Array) -> Array:
    """The sum over rows of the cross-entropy with the right ones, smoothed; float32."""
    log_probabilities = jax.nn.log_softmax(similarities, axis=-1)
    right = same / same.sum(axis=-1, keepdims=True)
    targets = (1 - SMOOTHING) * right + SMOOTHING / same.shape[-1]
    return -(targets * log_probabilities).sum()


def _targets(batch: Batch) -> Array:
    """The next token behind each of a caption, up to `[SEP]`; [B, L - 1]."""
    return jnp.where(batch["caption_mask"][:, 1:], batch["captions"][:, 1:], IGNORE)
