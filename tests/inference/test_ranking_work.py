"""The work of ranking, counted on its programs: distinct beginnings, not candidates x prompt."""

import functools

import jax
import numpy as np
import pytest

from jax_instructblip.inference.ranking import NODES, make_plan, tree_logprobs
from jax_instructblip.models.flops import counted
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from tests.helpers.tiny import make_batch, tiny_variant

COUNTS = (100, 400, 1600)


def draw(count, words):
    """Distinct candidates of 2 to 4 of that many words."""
    rng, found = np.random.default_rng(0), {}
    while len(found) < count:
        found[tuple(rng.integers(3, 3 + words, rng.integers(2, 5)).tolist())] = None
    return list(found)


class Work:
    """FLOPs of the products behind the prompt."""

    def __init__(self, kind):
        self.variant, self.params = tiny_variant(kind), param_shapes(tiny_variant(kind))
        self.model = VisionLanguageModel(self.variant)

    def __call__(self, candidates, prompt=8):
        batch = make_batch(self.variant, rows=1, text=prompt)
        prefill = functools.partial(self.model.apply, method="prefill")
        made = jax.eval_shape(lambda p, b: prefill({"params": p}, b, 0), self.params, batch)
        rank = functools.partial(tree_logprobs, self.model)
        chunks = make_plan([candidates]).chunks
        return sum(counted(rank, self.params, *made, chunk)[0] for chunk in chunks)


def inner(candidates):
    return len({ids[:depth] for ids in candidates for depth in range(1, len(ids))})


@pytest.fixture(scope="module", params=["llama", "t5"])
def work(request):
    return Work(request.param)


def test_it_grows_with_distinct_inner_tokens(work):
    drawn = [draw(count, words) for count in COUNTS for words in (12, 30, 3000)]
    each = {inner(candidates): work(candidates) / inner(candidates) for candidates in drawn}
    assert max(each) > 10 * min(each)  # inner tokens
    # Chunks differ in size, and each token of one is compared with the others of its chunk alone.
    assert max(each.values()) < 2 * min(each.values())


def test_candidates_that_begin_alike_cost_nothing(work):
    """A hundred ends of the same beginnings, and one of each."""
    few = [(3, 4, end) for end in range(3, 5)] + [(5, 6, 7)]
    many = [(3, 4, end) for end in range(3, 53)] + [(5, 6, end) for end in range(3, 53)]
    assert inner(few) == inner(many) and work(few) == work(many)


def test_a_longer_prompt_costs_attention_to_it_alone(work):
    candidates = draw(100, 30)
    llm = work.variant.llm
    layers = llm.decoder_layers if llm.kind == "t5" else llm.layers
    (chunk,) = make_plan([candidates]).chunks
    more = work(candidates, prompt=108) - work(candidates, prompt=8)
    assert more == 4 * layers * chunk.tokens.shape[1] * 100 * llm.heads * llm.head_width
    assert chunk.tokens.shape[1] <= NODES
