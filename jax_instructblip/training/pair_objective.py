"""The objective of BLIP-2's first stage: contrast (ITC), match (ITM) and captioning (ITG) of pairs.

    similarities [B, B] of the whole batch --cross-entropy, own pair is the target--> ITC
                                           --draw a hard negative for each row--> 3 B pairs
                                                                 --match or no match--> ITM
    captions after the ITC pass's queries (cached keys and values) --cross-entropy--> ITG

The loss is the unweighted sum of the three. Similarities are computed over the *global* batch. In
each similarity the other side's features carry no gradient, as in the released code.
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

SMOOTHING = 0.1  # label smoothing of ITC and ITG
NEVER = -10_000.0  # logit of pairs that must not be drawn as negatives

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class PairObjective:
    """ITC + ITM + ITG loss; a batch has `images`, `captions`, `caption_mask` and `image_id`.

    Attributes:
      model: the model that is trained.
      by_image: if True, all captions with the same `image_id` are positives of that image
        (fine-tuning for retrieval); if False, only the image's own caption.
      whole_batch: the reason why the batch cannot be divided (`Objective.whole_batch`).
    """

    model: Blip2
    by_image: bool = False
    whole_batch: str = "each pair is compared with all others of the batch"

    def totals(self, batch: Batch) -> Totals:
        """Returns a dict of float32 scalars: `pairs`, and `tokens`, the caption targets."""
        pairs = jnp.asarray(batch["captions"].shape[0], jnp.float32)
        return {"pairs": pairs, "tokens": count_targets(_targets(batch))}

    def __call__(
        self, params: Any, batch: Batch, rng: Array, totals: Totals
    ) -> tuple[Array, Metrics]:
        """Returns the loss, and its three terms `itc`, `itm` and `itg` as metrics."""
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
    """Returns `itc`, `itm` and `itg` as sums over the batch (not yet divided by totals).

    They are float32 scalars. `model` holds its weights (a bound module), `batch` is the global one.
    `key` draws the hard negatives. If the batch has `negative_images` and `negative_texts` [B]
    (indices into the batch), these are used instead. `by_image` is that of `PairObjective`; `train`
    turns dropout on.
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
    """Returns the mask [B, B] of pairs with equal `ids` [B]; its diagonal is always True."""
    return constrain(ids[:, None] == ids[None, :])


def draw_negatives(key: Array, by_row: tuple[Array, Array], same: Array) -> tuple[Array, Array]:
    """Draws hard negatives: a text index [B] for each image, an image index [B] for each text.

    Each index is drawn from the softmax of its row. `by_row` are the similarities of images to
    texts and of texts to images, each [B, B] and divided by the temperature. Pairs in the mask
    `same` [B, B] are drawn only if their row has no others.
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
    """Returns logits [B, 3, 2] of (no match, match) for three pairs per sample.

    The pairs are image and caption, image and negative caption, negative image and caption.
    `patches` [B, P, Dv] are the vision tower's output, `tokens` and `valid` (True on tokens) [B, L]
    the captions, all of the global batch; `images_of` and `texts_of` [B] are the indices in it of
    each sample's negatives, which may be on other devices. `train` turns dropout on. The three
    pairs of a sample are adjacent rows, so that all else stays on its device. The keys and values
    of its image serve two of them.
    """
    three = lambda *each: jnp.stack(each, axis=1).reshape(-1, *each[0].shape[1:])
    logits = model.match_logits(
        (patches, patches[images_of]),
        three(tokens, tokens[texts_of], tokens),
        three(valid, valid[texts_of], valid),
        train,
    )
    return logits.reshape(-1, 3, 2)


def _contrast(similarities: Array, same: Array) -> Array:
    """Returns the label-smoothed cross-entropy with targets `same`, summed over rows; float32."""
    log_probabilities = jax.nn.log_softmax(similarities, axis=-1)
    right = same / same.sum(axis=-1, keepdims=True)
    targets = (1 - SMOOTHING) * right + SMOOTHING / same.shape[-1]
    return -(targets * log_probabilities).sum()


def _targets(batch: Batch) -> Array:
    """Returns the next token after each caption token, up to `[SEP]`; int32 [B, L - 1]."""
    return jnp.where(batch["caption_mask"][:, 1:], batch["captions"][:, 1:], IGNORE)
