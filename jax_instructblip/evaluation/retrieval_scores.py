"""Retrieval recalls of BLIP-2's first stage: by feature similarity, and re-ranked by matching."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.pairs import image_id
from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics.retrieval import BACK, FORTH, mean_recall, recalls
from jax_instructblip.inference.retrieval import CANDIDATES, Retriever
from jax_instructblip.models.blip2 import Blip2


def retrieval_scores(
    model: Blip2, params: dict[str, Any], text: CaptionTokenizer, records: Sequence[Record]
) -> dict[str, float]:
    """Returns recalls at 1, 5 and 10 between all images and captions of the records, by name.

    `recall`, the first, and `score`, the last, are the mean R@1 of both directions after re-ranking
    with the match head. Names with `itc/` are recalls of feature similarity alone. A caption that
    several images share is right for each of them.

    Raises:
      ValueError: there are no captions, or several processes run.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "the first stage is validated in one process: leave out config.validation.path, and "
            "evaluate its checkpoints afterwards"
        )
    captions_of: dict[int, set[str]] = {}
    pictures: dict[int, Any] = {}
    for record in records:
        number = image_id(record)
        pictures.setdefault(number, record.images[0])
        captions_of.setdefault(number, set()).update(record.answers)
    captions = sorted(set().union(*captions_of.values()))
    right = np.array([[each in of for each in captions] for of in captions_of.values()])
    blip = Retriever(model.variant, params, text, dtype=model.dtype, silent=True)
    images = list(pictures.values())
    near = blip.itc(images, captions)
    ranking = blip.rank(images, captions, k=CANDIDATES, near=near)
    values = {}
    for prefix, forth, back in (
        ("", ranking.image_to_text, ranking.text_to_image),
        ("itc/", near, near.T),
    ):
        for name, scores, truth in (
            (FORTH, forth, right),
            (BACK, back, right.T),
        ):
            for rank, value in recalls(scores, truth).items():
                values[f"{prefix}{name}/{rank}"] = value
    recall = mean_recall(values)
    return {"recall": recall, **values, "score": recall}
