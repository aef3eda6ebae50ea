"""The smallest models that have every part, and a batch for each."""

import jax
import numpy as np
import pytest

from jax_instructblip.data.batch import IGNORE
from jax_instructblip.models.instructblip import InstructBlip, init_params
from jax_instructblip.models.variants import (
    LlamaConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)
from jax_instructblip.training.optimizer import adamw, warmup_cosine
from jax_instructblip.training.state import create_state, partition

# Sizes differ from each other, so that a shape tells what it belongs to.
LANGUAGE = {
    "llama": LlamaConfig(width=24, heads=3, mlp=40, layers=2, vocab=61, pad_id=60),
    "t5": T5Config(
        width=24, head_width=5, heads=3, mlp=40, encoder_layers=2, decoder_layers=2, vocab=61
    ),
}


def micro(kind: str, **fields) -> Variant:
    vision = VisionConfig(image_size=28, width=22, layers=2, heads=2, mlp=36)
    qformer = QFormerConfig(
        22, 24, width=16, layers=2, heads=4, mlp=28, vocab=50, max_positions=32, queries=7
    )
    return Variant(vision, qformer, LANGUAGE[kind]).replace(**fields)


def make_batch(variant: Variant, rows: int = 4, text: int = 9, answer: int = 6, seed: int = 0):
    rng = np.random.default_rng(seed)
    size = variant.vision.image_size
    ids = lambda vocab, *shape: rng.integers(3, vocab - 1, shape).astype(np.int32)  # noqa: E731
    mask = np.arange(text) < rng.integers(answer, text + 1, (rows, 1))
    batch = {
        "images": rng.integers(0, 256, (rows, 1, size, size, 3)).astype(np.uint8),
        "qformer_tokens": ids(variant.qformer.vocab, rows, text),
        "qformer_mask": mask,
        "tokens": ids(variant.llm.vocab, rows, text),
        "mask": mask,
    }
    if variant.llm.kind == "t5":
        lengths = rng.integers(1, answer + 1, (rows, 1))
        targets = ids(variant.llm.vocab, rows, answer)
        batch["decoder_tokens"] = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
        batch["targets"] = np.where(np.arange(answer) < lengths, targets, IGNORE).astype(np.int32)
        return batch
    asked = mask & (np.arange(text) >= answer - 2)
    batch["targets"] = np.where(asked, ids(variant.llm.vocab, rows, text), IGNORE).astype(np.int32)
    return batch


@pytest.fixture(scope="session")
def tuning():
    """`tuning("t5")`: model, optimizer, schedule, state, frozen weights and a batch of it."""

    def make(kind: str, trainable=("qformer",), learning_rate=1e-2, **fields):
        variant = micro(kind, **fields)
        params = init_params(variant, jax.random.key(0))
        chosen, frozen = partition(params, trainable)
        schedule = warmup_cosine(
            start=0.0, peak=learning_rate, end=0.0, warmup_steps=1, total_steps=100
        )
        optimizer = adamw(schedule)
        settings = dict(model=InstructBlip(variant), optimizer=optimizer, schedule=schedule)
        return settings, create_state(chosen, optimizer), frozen, make_batch(variant)

    return make
