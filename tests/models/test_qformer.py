import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.models.qformer import QFormer
from tests.helpers.numerics import error, random_params, small

CONFIG = small("t5").qformer
PARAMS = jax.tree.map(jnp.asarray, random_params(small("t5"))["qformer"])
BLIND = dataclasses.replace(CONFIG, instruction_aware=False)
DRAW = np.random.default_rng(0)
IMAGE = jnp.asarray(DRAW.standard_normal((3, 17, CONFIG.vision_width), np.float32))
TOKENS = jnp.asarray(DRAW.integers(1, CONFIG.vocab, (3, 7)))


@functools.cache
def applied(config=CONFIG, train=False):
    return jax.jit(functools.partial(QFormer(config, jnp.float32).apply, train=train))


def look(tokens, lengths, image=IMAGE, params=PARAMS):
    valid = jnp.arange(tokens.shape[1])[None] < jnp.array(lengths)[:, None]
    return applied()({"params": params}, image, tokens, valid)


def test_padding_is_invisible():
    lengths = (2, 7, 4)
    together = look(TOKENS, lengths)
    assert together.shape == (3, CONFIG.queries, CONFIG.llm_width)
    longer = look(jnp.pad(TOKENS, ((0, 0), (0, 5)), constant_values=9), lengths)
    assert error(longer, together) < 1e-5
    for row, length in enumerate(lengths[:2]):
        alone = look(TOKENS[row : row + 1, :length], [length], IMAGE[row : row + 1])
        assert error(alone[0], together[row]) < 1e-5


def test_the_instruction_and_its_order_matter():
    found = look(TOKENS, (7, 7, 7))
    assert error(look(TOKENS[:, ::-1], (7, 7, 7)), found) > 1e-2
    assert error(look(TOKENS, (6, 6, 6)), found) > 1e-3


def test_the_image_matters():
    assert error(look(TOKENS, (7, 7, 7), IMAGE[::-1]), look(TOKENS, (7, 7, 7))) > 1e-2


def test_queries_pass_the_norm_that_the_text_passes():
    params = {**PARAMS, "queries": 7 * PARAMS["queries"]}
    normed = look(TOKENS, (7, 7, 7), params=params)
    centred = PARAMS["queries"] - PARAMS["queries"].mean(-1, keepdims=True)
    params = {**PARAMS, "queries": centred}
    assert error(normed, look(TOKENS, (7, 7, 7))) < 1e-5
    assert error(look(TOKENS, (7, 7, 7), params=params), normed) < 1e-5


def test_a_blind_qformer_ignores_the_instruction():
    text = ("text_embed", "position_embed")
    params = {key: leaf for key, leaf in PARAMS.items() if key not in text}
    params["layers"] = {
        kind: {key: leaf for key, leaf in pair.items() if not key.startswith("text_mlp")}
        for kind, pair in PARAMS["layers"].items()
    }
    alone = applied(BLIND)({"params": params}, IMAGE)
    assert alone.shape == (3, CONFIG.queries, CONFIG.llm_width)
    given = applied(BLIND)({"params": params}, IMAGE, TOKENS, TOKENS > 0)
    np.testing.assert_array_equal(given, alone)


def test_dropout_is_drawn_in_training_only():
    valid = TOKENS > 0
    keys = [{"dropout": jax.random.key(seed)} for seed in (0, 0, 1)]
    train = [
        applied(train=True)({"params": PARAMS}, IMAGE, TOKENS, valid, rngs=key) for key in keys
    ]
    np.testing.assert_array_equal(train[0], train[1])
    assert error(train[2], train[0]) > 1e-2
    assert error(applied()({"params": PARAMS}, IMAGE, TOKENS, valid), train[0]) > 1e-2


def test_the_default_image_norm_is_that_of_the_original_code():
    assert CONFIG.image_norm_eps == 1e-5
    faint = 1e-3 * IMAGE  # variance 1e-6: the eps is most of the denominator
    config = dataclasses.replace(CONFIG, image_norm_eps=1e-6)
    other = applied(config)({"params": PARAMS}, faint, TOKENS, TOKENS > 0)
    assert error(other, look(TOKENS, (7, 7, 7), faint)) > 1e-2


def test_a_missing_instruction_is_refused():
    with pytest.raises(ValueError, match="lacks qformer_tokens or qformer_mask"):
        QFormer(CONFIG, jnp.float32).apply({"params": PARAMS}, IMAGE)


def test_an_instruction_beyond_the_positions_is_refused():
    tokens = jnp.ones((3, CONFIG.max_positions + 1), jnp.int32)
    with pytest.raises(ValueError, match="25 tokens, the Q-Former has 24 positions: truncate"):
        QFormer(CONFIG, jnp.float32).apply({"params": PARAMS}, IMAGE, tokens, tokens > 0)
