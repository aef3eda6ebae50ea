"""One model with random weights, both in transformers and in this package, on a CPU.

Weights and questions are equal, so both sides must give the same answers.
"""

import contextlib
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks.theirs import config_of
from benchmarks.workload import Lengths, variant_of
from jax_instructblip.conversion.hf_folder import read_hf
from jax_instructblip.data.batch import collate
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vision import IMAGE_MEAN, IMAGE_STD
from jax_instructblip.models.vlm import VisionLanguageModel, unstack_decoder


class Twins(NamedTuple):
    """The same model twice, in float32: transformers' module, and ours with its parameters."""

    theirs: transformers.InstructBlipForConditionalGeneration
    ours: VisionLanguageModel
    params: dict[str, Any]
    variant: Variant


def make_twins(name: str, seed: int = 0) -> Twins:
    """Returns the variant `name` with random weights, scaled to keep activations in range."""
    torch.manual_seed(seed)
    torch.set_num_threads(os.cpu_count() or 1)
    with quiet():
        config = config_of(variant_of(name))
        config._attn_implementation = "sdpa"
        theirs = transformers.InstructBlipForConditionalGeneration(config).eval()
    with torch.no_grad():
        for key, leaf in theirs.named_parameters():
            if leaf.ndim > 1:
                embedded = "embed" in key or "token" in key or "shared" in key
                leaf.normal_(0, 0.3 if embedded else 0.7 / math.sqrt(leaf[0].numel()))
    with tempfile.TemporaryDirectory() as folder, quiet():
        theirs.save_pretrained(folder)
        variant, params = read_hf(folder)
    params = unstack_decoder(variant, jax.tree.map(jnp.asarray, params))  # as `load` does
    ours = VisionLanguageModel(variant, scans=Scans(llm=Scan(unstacked=True)))
    return Twins(theirs, ours, params, variant)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses warnings and progress bars of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def questions(variant: Variant, size: int, lengths: Lengths) -> tuple[dict, dict]:
    """Returns `size` questions without padding: transformers' inputs, and our batch."""
    rng = np.random.default_rng(0)
    side, m = variant.vision.image_size, variant.llm
    ids = lambda width, vocab: rng.integers(3, vocab, (size, width)).astype(np.int32)
    images = rng.integers(0, 256, (size, 1, side, side, 3), dtype=np.uint8)
    text = ids(lengths.instruction, variant.qformer.vocab)
    tokens = ids(lengths.prompt, m.vocab - 2)
    seen = np.full((size, variant.visual_tokens), m.vocab - 1, np.int32)
    pixels = (images[:, 0] / 255 - IMAGE_MEAN) / IMAGE_STD
    given = {
        "qformer_input_ids": text,
        "qformer_attention_mask": np.ones_like(text),
        "input_ids": np.concatenate([seen, tokens], axis=1),
        "attention_mask": np.ones((size, seen.shape[1] + tokens.shape[1]), np.int32),
    }
    theirs = {name: torch.tensor(leaf, dtype=torch.long) for name, leaf in given.items()}
    theirs["pixel_values"] = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    examples = [
        {"images": images[row], "qformer_tokens": text[row], "tokens": tokens[row]}
        for row in range(size)
    ]
    return theirs, jax.device_put(collate(examples, visual_tokens=variant.visual_tokens))
