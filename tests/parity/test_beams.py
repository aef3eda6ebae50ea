"""Beam search: token for token that of the original code, and that of transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_instructblip
from jax_instructblip.inference.beam_search import beam_tokens
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.vlm import VisionLanguageModel
from tests.helpers import golden
from tests.parity.test_generation import (
    CASES,
    NEW,
    PROMPTS,
    SIDE,
    answers_of_transformers,
    reseeded,
)

# How the original code was asked: its `max_length` and `min_length` count the id before the first
# new one, for decoder-only models also in the limit (`max_length` 12 is 11 new tokens there).
SETTINGS = {
    "beam5_lp-1": {"length_penalty": -1.0},
    "beam5_lp0": {"length_penalty": 0.0},
    "beam5_lp1": {},
    "beam5_lp2": {"length_penalty": 2.0},
    "beam5_rep1.5_lp1": {"repetition_penalty": 1.5},
    "beam5_rep1.5_lp-1_min6_max9": {
        **{"repetition_penalty": 1.5, "length_penalty": -1.0},
        **{"min_new_tokens": 5, "max_new_tokens": 9},
    },
    "beam3_ret3_lp1": {"num_beams": 3, "max_new_tokens": 10},
    "beam5_rep1.5_lp1_max30": {"repetition_penalty": 1.5, "max_new_tokens": 30},
}
RECORDED = [
    *(("generate", setting) for setting in SETTINGS),
    *(("generate_video", setting) for setting in ("beam5_lp-1", "beam5_rep1.5_lp1")),
    ("generate_single0", "beam5_lp1"),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tag", "setting"), RECORDED)
def test_answers_are_those_of_the_original_code(shared, case, tag, setting):
    outputs = golden.outputs(case)
    recorded = outputs[f"{tag}/{setting}/ids"][:, 1:]
    settings = {"num_beams": 5, "max_new_tokens": 12} | SETTINGS[setting]
    settings["max_new_tokens"] -= case != "instruct_t5"
    model = VisionLanguageModel(golden.variant(case))
    config = GenerationConfig(**settings)
    made = beam_tokens(model, golden.params(case), golden.batch(case, tag), config)
    made = jax.tree.map(np.asarray, made)
    kept = len(recorded) // len(made["tokens"])
    rows = [
        list(row[:length])
        for tokens, lengths in zip(made["tokens"], made["lengths"], strict=True)
        for row, length in zip(tokens[:kept], lengths[:kept], strict=True)
    ]
    assert rows == [until(list(row), model.variant.llm.eos_id) for row in recorded]
    scores = made["scores"][:, :kept].reshape(-1)
    np.testing.assert_allclose(
        scores, outputs[f"{tag}/{setting}/sequences_scores"], rtol=1e-4, atol=1e-4
    )


def until(row, eos):
    return row[: row.index(eos) + 1] if eos in row else row


@pytest.mark.parametrize("variant", ["instructblip-flan-t5-xl", "instructblip-vicuna-7b"])
def test_answers_are_those_of_transformers(variant, forge, tmp_path):
    """Thirty prompts in three settings; answers that end are in the recorded ones."""
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in PROMPTS]
    distinct = set()
    for seed, settings in enumerate(
        [
            {"length_penalty": 0.0, "repetition_penalty": 1.5},
            {"length_penalty": 1.0, "num_return_sequences": 3},
            {"length_penalty": -1.0, "repetition_penalty": 1.5, "min_new_tokens": 8},
        ]
    ):
        folder = reseeded(forge(variant), tmp_path / str(seed), seed)
        blip = jax_instructblip.load(folder, dtype=jnp.float32)
        asked = {"num_beams": 5, "max_new_tokens": NEW, **settings}
        answers = blip.generate(
            images, PROMPTS, length_rule="transformers5", batch_size=len(PROMPTS), **asked
        )
        rows = [list(a.tokens) for first in answers for a in (first, *first.alternatives)]
        assert rows == answers_of_transformers(folder, images, blip.variant.llm, **asked)
        distinct |= set(map(tuple, rows))
    assert len(distinct) > len(PROMPTS)  # random weights seldom end an answer: no length is asked


WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})
EVERY = [
    {"length_penalty": length, "repetition_penalty": repetition, "min_new_tokens": least}
    for length in (-1.0, 0.0, 1.0)
    for repetition in (1.0, 1.5)
    for least in (1, 8)
]


@pytest.mark.full
@pytest.mark.parametrize("variant", ["instructblip-flan-t5-xl", "instructblip-vicuna-7b"])
def test_every_setting_on_fifty_random_prompts(variant, forge, tmp_path):
    """All twelve, three answers each, of a model that likes to end: eos is a word as any other."""
    rng = np.random.default_rng(2)
    prompts = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(50)]
    images = [rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in prompts]
    folder, eos = reseeded(forge(variant), tmp_path / "lively", 5), get_variant(variant).llm.eos_id
    weights = load_file(folder / "model.safetensors")
    weights["language_model.lm_head.weight"][eos] *= 3
    # `<image>` is never written: transformers counts it as an id of the prompt, we do not.
    image = json.loads((folder / "config.json").read_text())["image_token_index"]
    weights["language_model.lm_head.weight"][image] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    blip = jax_instructblip.load(folder, dtype=jnp.float32)
    ended, lengths = 0, set()
    for each in EVERY:
        asked = {"num_beams": 5, "max_new_tokens": 16, "num_return_sequences": 3, **each}
        answers = blip.generate(
            images, prompts, length_rule="transformers5", batch_size=len(prompts), **asked
        )
        rows = [list(a.tokens) for first in answers for a in (first, *first.alternatives)]
        assert rows == answers_of_transformers(folder, images, blip.variant.llm, prompts, **asked)
        ended += sum(row[-1] == eos for row in rows)
        lengths |= {len(row) for row in rows}
    assert ended > 100 and len(lengths) > 5
