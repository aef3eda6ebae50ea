"""Captions of the first stage beside those that the original code generated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.inference.beam_search import beam_tokens
from jax_instructblip.inference.decode import generate_tokens
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.sampling import row_keys, seed_key
from jax_instructblip.models.blip2 import Blip2, CaptionVocabulary, begin_caption
from tests.helpers import golden, golden_blip2

SEP = 3  # of the small tokenizer
# Lengths of the original count [DEC]; the version of transformers is that of BLIP-2's release.
RECORDED = {
    "generate/greedy_max12_min4": dict(max_new_tokens=11, min_new_tokens=3),
    "generate/greedy_max20_min1": dict(max_new_tokens=19),
    "generate_tf4.26.1/beam3_max12_min4": dict(num_beams=3, max_new_tokens=11, min_new_tokens=3),
    "generate_tf4.26.1/beam3_max20_min1": dict(num_beams=3, max_new_tokens=19),
    "generate_tf4.26.1/beam5_max12_min1": dict(num_beams=5, max_new_tokens=11),
}


@pytest.fixture(scope="module")
def stage(shared, tmp_path_factory):
    variant = golden_blip2.variant()
    ids = CaptionVocabulary(variant.qformer.vocab, variant.qformer.vocab - 1, SEP, 0)
    model = Blip2(variant, vocabulary=ids)
    images = golden.images()
    batch = {
        "images": images,
        "tokens": np.full((len(images), 1), ids.bos_id, np.int32),
        "slots": np.full((len(images), 1), -1, np.int32),
        "segments": np.ones((len(images), 1), np.int32),
    }
    params = golden_blip2.params(tmp_path_factory.mktemp("original"))
    return model, params, batch, golden.outputs(golden_blip2.CASE)


@pytest.mark.parametrize("name", RECORDED)
def test_tokens_are_those_of_the_original(stage, name):
    model, params, batch, recorded = stage
    config = GenerationConfig(**RECORDED[name], length_rule="transformers4.26")
    if config.num_beams > 1:
        found = beam_tokens(model, params, batch, config)
        scores = recorded[f"{name}/sequences_scores"]
        np.testing.assert_allclose(found["scores"][:, 0], scores, atol=1e-4)
    else:
        keys = row_keys(seed_key(0), np.arange(len(batch["tokens"])))
        found = generate_tokens(model, params, batch, keys, config)
    expected = recorded[f"{name}/ids"][:, 1:]
    for row, wanted in enumerate(expected):
        tokens = np.asarray(found["tokens"][row, 0, : found["lengths"][row, 0]])
        length = len(tokens)
        np.testing.assert_array_equal(tokens, wanted[:length])
        assert not wanted[length:].any()


def test_steps_with_a_cache_are_the_whole_text(stage):
    """Logits of one token after the other, and of the text at once behind the queries."""
    model, params, batch, _ = stage
    rng = np.random.default_rng(0)
    text = rng.integers(4, 190, (3, 6)).astype(np.int32)
    text[:, 0] = batch["tokens"][:, 0]
    batch, text = jax.tree.map(jnp.asarray, (batch, text))

    @jax.jit
    def whole(params):
        patches = model.apply({"params": params}, batch["images"][:, 0], method="encode_image")
        _, kv = model.apply({"params": params}, patches, method="image_features", return_kv=True)
        tokens = begin_caption(text, model.vocabulary.vocab)
        valid = jnp.ones(text.shape, bool)
        return model.apply({"params": params}, tokens, valid, kv, method="caption_logits")

    @jax.jit
    def steps(params):
        logits, cache = model.apply({"params": params}, batch, 5, method="prefill")
        found = [logits]
        for index in range(1, 6):
            token = text[:, index : index + 1]
            logits, cache = model.apply({"params": params}, token, cache, method="decode_step")
            found.append(logits)
        return jnp.concatenate(found, axis=1)

    np.testing.assert_allclose(steps(params), whole(params), atol=1e-5)
