"""Captions of BLIP-2's first stage: the text that the Q-Former generates after its queries (ITG).

    image --vision, Q-Former--> keys and values of the queries --[DEC]--> token --> token ... [SEP]

The loops are those of every generative model (`decode.py`, `beam_search.py`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.fields import check, whole
from jax_instructblip.inference.answers import Answer, best_answer, check_finite
from jax_instructblip.inference.batching import (
    Frame,
    check_batch_size,
    check_images_listed,
    pixels,
)
from jax_instructblip.inference.beam_search import beam_tokens
from jax_instructblip.inference.decode import generate_tokens
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.sampling import row_keys, seed_key
from jax_instructblip.models.blip2 import Blip2, CaptionVocabulary
from jax_instructblip.models.variants import Variant
from jax_instructblip.progress import Progress


def generate_captions(
    variant: Variant,
    params: dict[str, Any],
    text: CaptionTokenizer,
    images: Sequence[Frame],
    config: GenerationConfig,
    *,
    batch_size: int,
    dtype: Any,
    silent: bool = False,
    on_devices: Callable[[np.ndarray], Any] = lambda rows: rows,
    multiple: int = 1,
) -> list[Answer]:
    """Returns a caption of each image, in order.

    Args:
      variant: a first stage with a caption head.
      params: its parameters, on their devices.
      text: its tokenizer.
      images: paths, bytes of image files, PIL images or uint8 arrays `[H, W, 3]`.
      config: how to decode. LAVIS has 3 beams, 9 to 29 new tokens ([DEC] counts in its 10 to 30).
      batch_size: images that are captioned at once.
      dtype: the compute dtype.
      silent: True shows no progress line.
      on_devices: puts the rows of an array on the devices that compute them.
      multiple: the number of parts into which the devices split a batch.

    Raises:
      ValueError: the model has no caption head, there are no images, an image cannot be used,
        `max_new_tokens` exceeds the Q-Former's positions, or scores are not finite.
    """
    if not variant.qformer.caption_head:
        raise ValueError(
            "this first stage has no caption head, which Hugging Face's format leaves out: convert "
            "the original file (blip2_pretrained.pth), or train a first stage"
        )
    check_images_listed(images)
    check_batch_size(batch_size)
    most = variant.qformer.max_positions  # [DEC] has one, the last token none
    check({"max_new_tokens": config.max_new_tokens}, {"max_new_tokens": whole(1, most)})
    tokenizer = text.tokenizer
    vocabulary = CaptionVocabulary(
        variant.qformer.vocab,
        tokenizer.bos_token_id,
        tokenizer.sep_token_id,
        tokenizer.pad_token_id,
    )
    model = Blip2(variant, dtype, vocabulary=vocabulary)
    size, key, answers = min(batch_size, len(images)), seed_key(config.seed), []
    size += -size % multiple
    with Progress(len(images), "captioning", "images", compiles=True, silent=silent) as progress:
        for start in range(0, len(images), size):
            rows = np.minimum(np.arange(start, start + size), len(images) - 1)
            batch = {
                "images": pixels([images[row] for row in rows], variant.vision.image_size)[:, None],
                "tokens": np.full((size, 1), vocabulary.bos_id, np.int32),
                "slots": np.full((size, 1), -1, np.int32),
                "segments": np.ones((size, 1), np.int32),
            }
            batch = {name: on_devices(leaf) for name, leaf in batch.items()}
            if config.num_beams > 1:
                generated = beam_tokens(model, params, batch, config)
            else:
                generated = generate_tokens(
                    model, params, batch, row_keys(key, on_devices(rows)), config
                )
            generated, count = jax.device_get(generated), min(size, len(images) - start)
            answers += [
                best_answer(text, generated, row, config.num_return_sequences)
                for row in range(count)
            ]
            progress.update(count)
    check_finite([i for i, each in enumerate(answers) if not math.isfinite(each.logprob)], dtype)
    return answers
