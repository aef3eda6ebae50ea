"""Rows of a cache that continue each other, with stacked and with unstacked layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.models.cache import (
    append,
    attend_tail,
    expand_beams,
    reorder_beams,
    start,
    tail_view,
)
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.vlm import VisionLanguageModel, unstack_decoder
from tests.helpers.numerics import error, random_params
from tests.helpers.rows import lay_out, read_text, to_answer
from tests.helpers.tiny import make_batch, tiny_variant

STEPS = 4
PARENTS = (  # which row each of three continues: [step, B, R]
    ((0, 1, 2), (0, 1, 2)),
    ((2, 0, 1), (0, 0, 1)),
    ((1, 1, 0), (2, 1, 0)),
    ((0, 2, 2), (1, 0, 1)),
)


class Small:
    """A model with stacked or unstacked layers, and what it makes of whole rows."""

    def __init__(self, kind, unstacked):
        self.variant = tiny_variant(kind)
        self.model = VisionLanguageModel(self.variant, scans=Scans(llm=Scan(unstacked=unstacked)))
        params = jax.tree.map(jnp.asarray, random_params(self.variant))
        self.params = unstack_decoder(self.variant, params) if unstacked else params
        self.batch = to_answer(make_batch(self.variant, rows=2))
        apply = functools.partial(self.model.apply, {"params": self.params})
        self.prefill = jax.jit(lambda batch: apply(batch, STEPS, method="prefill"))
        self.step = jax.jit(lambda *arguments: apply(*arguments, method="decode_step"))

    def whole(self, row, answer):
        """Logits `[len(answer) + 1, V]` behind the prompt of `row` and each of its tokens."""
        one = read_text(self.variant, self.batch)
        one = {name: leaf[row : row + 1] for name, leaf in one.items()}
        count = int(one["mask"].sum())
        if self.variant.llm.kind == "t5":
            start = self.variant.llm.decoder_start_id
            one["decoder_tokens"] = np.array([[start, *answer]], np.int32)
            count = 1
        else:
            one["tokens"] = np.array([[*one["tokens"][0, :count], *answer]], np.int32)
            one["mask"] = np.ones(one["tokens"].shape, bool)
        one = lay_out(self.variant, one)
        logits = jax.jit(self.model.apply)({"params": self.params}, one)[0]
        return logits[count - 1 : count + len(answer)]


@functools.cache
def small(kind, unstacked):
    return Small(kind, unstacked)


@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_rows_that_continue_others_are_whole_rows(kind, unstacked):
    one = small(kind, unstacked)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 50, (STEPS, 2, 3)).astype(np.int32)  # [step, B, R]
    parents = np.array(PARENTS)
    first, cache = one.prefill(one.batch)
    cache = expand_beams(cache, 3)
    answers, logits = [[[] for _ in range(3)] for _ in range(2)], []
    for step in range(STEPS):
        cache = reorder_beams(cache, jnp.asarray(parents[step]))
        answers = [
            [answers[b][parents[step, b, r]] + [int(tokens[step, b, r])] for r in range(3)]
            for b in range(2)
        ]
        logits, cache = one.step(tokens[step], cache)
    assert len({tuple(row[:-1]) for row in answers[0]}) > 1  # of different ancestors
    for b in range(2):
        for r in range(3):
            expected = one.whole(b, answers[b][r])
            assert error(first[b, 0], expected[0]) < 1e-5
            assert error(logits[b, r], expected[-1]) < 1e-5


def test_unstacked_layers_are_the_stack():
    for kind in ("llama", "t5"):
        stack, apart = small(kind, False), small(kind, True)
        expected, found = stack.prefill(stack.batch)[0], apart.prefill(apart.batch)[0]
        assert error(found, expected) < 1e-6


@pytest.mark.parametrize("unstacked", [False, True])
def test_a_written_row_is_its_own_from_that_step_on(unstacked):
    layer = {"key": jnp.zeros((1, 2, 5, 4)), "value": jnp.zeros((1, 2, 5, 4))}
    prefix = (layer,) if unstacked else jax.tree.map(lambda leaf: leaf[None], layer)
    cache = expand_beams(start(prefix, jnp.ones((1, 5), bool), 3), 2)
    token = {name: jnp.arange(16.0).reshape(1, 2, 2, 4) for name in layer}
    for parents in ([0, 1], [1, 1]):
        cache = reorder_beams(cache, jnp.array([parents]))
        if unstacked:
            outputs = (attend_tail(cache["tail"][0], token, tail_view(cache))[2],)
        else:
            outputs = jax.tree.map(lambda leaf: leaf[None], token)
        cache = append(cache, outputs)
    assert cache["step"] == 2 and cache["lineage"][0, :, :2].tolist() == [[1, 0], [1, 1]]
    tail = cache["tail"][0] if unstacked else jax.tree.map(lambda leaf: leaf[0], cache["tail"])
    assert tail["key"].shape == (1, 2, 6, 4)
    np.testing.assert_array_equal(tail["key"][:, :, 2:4], token["key"])
    assert not tail["value"][:, :, 4:].any()
