"""Rows of a cache that continue each other, with stacked and with separate layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.models.cache import follow, look, start, view, widen, write
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.vlm import VisionLanguageModel, separate_decoder
from tests.helpers.numerics import error, random_params
from tests.helpers.rows import lay_out, read_text, to_answer
from tests.helpers.tiny import make_batch, micro

STEPS = 4
PARENTS = (  # which row each of three continues: [step, B, R]
    ((0, 1, 2), (0, 1, 2)),
    ((2, 0, 1), (0, 0, 1)),
    ((1, 1, 0), (2, 1, 0)),
    ((0, 2, 2), (1, 0, 1)),
)


class Small:
    """A model with stacked or separate layers, and what it makes of whole rows."""

    def __init__(self, kind, separate):
        self.variant = micro(kind)
        self.model = VisionLanguageModel(self.variant, scans=Scans(llm=Scan(separate=separate)))
        params = jax.tree.map(jnp.asarray, random_params(self.variant))
        self.params = separate_decoder(self.variant, params) if separate else params
        self.batch = to_answer(make_batch(self.variant, rows=2))
        apply = functools.partial(self.model.apply, {"params": self.params})
        self.prefill = jax.jit(lambda batch: apply(batch, STEPS, method="prefill"))
        self.step = jax.jit(lambda *given: apply(*given, method="decode_step"))

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
def small(kind, separate):
    return Small(kind, separate)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_rows_that_continue_others_are_whole_rows(kind, separate):
    one = small(kind, separate)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 50, (STEPS, 2, 3)).astype(np.int32)  # [step, B, R]
    parents = np.array(PARENTS)
    first, cache = one.prefill(one.batch)
    cache = widen(cache, 3)
    answers, logits = [[[] for _ in range(3)] for _ in range(2)], []
    for step in range(STEPS):
        cache = follow(cache, jnp.asarray(parents[step]))
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


def test_separate_layers_are_the_stack():
    for kind in ("llama", "t5"):
        stack, apart = small(kind, False), small(kind, True)
        expected, found = stack.prefill(stack.batch)[0], apart.prefill(apart.batch)[0]
        assert error(found, expected) < 1e-6


@pytest.mark.parametrize("separate", [False, True])
def test_a_written_row_is_its_own_from_that_step_on(separate):
    layer = {"key": jnp.zeros((1, 2, 5, 4)), "value": jnp.zeros((1, 2, 5, 4))}
    prefix = (layer,) if separate else jax.tree.map(lambda leaf: leaf[None], layer)
    cache = widen(start(prefix, jnp.ones((1, 5), bool), 3), 2)
    token = {name: jnp.arange(16.0).reshape(1, 2, 2, 4) for name in layer}
    for parents in ([0, 1], [1, 1]):
        cache = follow(cache, jnp.array([parents]))
        if separate:
            made = (look(cache["tail"][0], token, view(cache))[2],)
        else:
            made = jax.tree.map(lambda leaf: leaf[None], token)
        cache = write(cache, made)
    assert cache["step"] == 2 and cache["lineage"][0, :, :2].tolist() == [[1, 0], [1, 1]]
    tail = cache["tail"][0] if separate else jax.tree.map(lambda leaf: leaf[0], cache["tail"])
    assert tail["key"].shape == (1, 2, 6, 4)
    np.testing.assert_array_equal(tail["key"][:, :, 2:4], token["key"])
    assert not tail["value"][:, :, 4:].any()
