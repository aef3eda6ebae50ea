import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.data.batch import IGNORE
from jax_instructblip.inference import ranking
from jax_instructblip.inference.ranking import (
    Sizes,
    describe_same,
    make_plan,
    pair_logprobs,
    round_up,
    same_tokens,
    score,
)
from jax_instructblip.models.vlm import VisionLanguageModel
from tests.helpers.numerics import random_params
from tests.helpers.rows import lay_out, read_text, to_answer
from tests.helpers.tiny import make_batch, tiny_variant

KINDS = ("llama", "t5")
QUESTIONS, BATCH = 80, 40
NOISE = 1e-5  # scores that are closer are equal: sums of float32 numbers near 10
TEXT, LONGEST = 9, 4  # tokens of a prompt, of a candidate


def draw(count, seed=0, eos=None):
    """Distinct candidates of 1 to 4 tokens; many have a beginning in common, or are one."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        ids = rng.integers(3, 20, rng.integers(1, LONGEST + 1))
        found[tuple(ids.tolist())] = None
    return [ids if eos is None else (*ids, eos) for ids in found]


class Small:
    """A model of one kind, random questions to it, and what it answers by brute force."""

    def __init__(self, kind):
        self.kind, self.variant = kind, tiny_variant(kind)
        self.model = VisionLanguageModel(self.variant)
        self.params = jax.tree.map(jnp.asarray, random_params(self.variant))
        drawn = make_batch(self.variant, rows=QUESTIONS, text=TEXT)
        self.batch = to_answer(drawn)
        seen = jax.jit(functools.partial(self.model.apply, method="visual_vectors"))
        self.seen = np.asarray(seen({"params": self.params}, self.batch))

    def draw(self, count, seed=0):
        return draw(count, seed, self.variant.llm.eos_id if self.kind == "t5" else None)

    def rows(self, rows):
        return {name: leaf[rows] for name, leaf in self.batch.items()}

    def rank(self, lists, nodes=ranking.NODES, batch=None, length_normalise=False):
        """Scores of the first `BATCH` questions, or of those of `batch`."""
        plan = make_plan(lists, nodes)
        batch = self.rows(slice(BATCH)) if batch is None else batch
        made = pair_logprobs(self.model, self.params, batch, plan.chunks)
        return score(plan, jax.device_get(made), length_normalise)

    @functools.cached_property
    def brute(self):
        """1,000 candidates, and their scores [QUESTIONS, 1000]: whole rows without any cache.

        Each candidate stands behind the whole prompt in a row of its own.
        """
        candidates = self.draw(1000, seed=1)
        parts = []
        for row in range(QUESTIONS):
            text = read_text(self.variant, self.batch)
            one = {name: text[name][row : row + 1] for name in ("tokens", "mask")}
            one["seen"] = self.seen[row : row + 1]
            many = {name: np.repeat(leaf, len(candidates), axis=0) for name, leaf in one.items()}
            parts.append(self.whole_rows(self.params, self.append(many, candidates)))
        return candidates, np.array(jax.device_get(parts))

    def append(self, many, candidates):
        longest = LONGEST + (self.kind == "t5")
        targets = np.full((len(candidates), longest), IGNORE, np.int32)
        for row, ids in enumerate(candidates):
            targets[row, : len(ids)] = ids
        if self.kind == "t5":
            shifted = np.pad(np.maximum(targets, 0), ((0, 0), (1, 0)))[:, :-1]
            return {**many, "decoder_tokens": shifted, "targets": targets}
        count = many["mask"][0].sum()
        width = ((0, 0), (0, longest))
        made = {
            **many,
            "tokens": np.pad(many["tokens"], width),
            "mask": np.pad(many["mask"], width),
        }
        made["targets"] = np.full_like(made["tokens"], IGNORE)
        made["tokens"][:, count : count + longest] = np.maximum(targets, 0)
        made["mask"][:, count : count + longest] = targets != IGNORE
        made["targets"][:, count - 1 : count - 1 + longest] = targets
        return made

    @functools.cached_property
    def whole_rows(self):
        def run(model, many):
            inputs = jnp.concatenate([many["seen"], model.llm.embed(many["tokens"])], axis=1)
            skip, targets = many["seen"].shape[1], many["targets"]
            valid = jnp.pad(many["mask"], ((0, 0), (skip, 0)), constant_values=True)
            segments, index = (
                valid.astype(jnp.int32),
                lambda leaf: jnp.broadcast_to(jnp.arange(leaf.shape[1]), leaf.shape[:2]),
            )
            rows = segments, index(inputs), index(targets) + (0 if self.kind == "t5" else skip)
            decoder = {}
            if self.kind == "t5":
                decoder["decoder_tokens"] = many["decoder_tokens"]
                decoder["decoder_segments"] = jnp.ones_like(many["decoder_tokens"])
            logits = model.llm(inputs, *rows, **decoder)
            found = jnp.take_along_axis(
                jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1
            )
            return jnp.where(targets == IGNORE, 0.0, found[..., 0]).sum(axis=-1)

        return jax.jit(lambda params, many: self.model.apply({"params": params}, many, method=run))


@pytest.fixture(scope="module", params=KINDS)
def small(request):
    return Small(request.param)


def test_plan_as_drawn():
    car, dog, red, a = 5, 6, 7, 8
    given = [(red, car), (red, dog), (a, red, dog), (red, car)]
    plan = make_plan([given])
    (tree,) = plan.chunks
    assert tree.tokens[0, :3].tolist() == [red, a, red]
    assert tree.depths[0, :3].tolist() == [1, 1, 2]
    assert tree.ends[0, :3].tolist() == [1, 3, 3]
    pairs = list(zip(tree.places[0].tolist(), tree.targets[0].tolist(), strict=True))
    assert pairs[:6] == [(0, red), (1, car), (1, dog), (0, a), (2, red), (3, dog)]
    assert plan.paths[0].tolist() == [[0, 1, -1], [0, 2, -1], [3, 4, 5], [0, 1, -1]]
    assert plan.counts[0].tolist() == [2, 2, 3, 2]


@pytest.mark.parametrize("nodes", [1, 7, 64, 10_000])
def test_every_candidate_finds_its_tokens_behind_their_ancestors(nodes):
    given = draw(500)
    plan = make_plan([given], nodes)
    pairs = plan.chunks[0].targets.shape[1]
    for ids, path in zip(given, plan.paths[0], strict=True):
        for depth, at in enumerate(path[: len(ids)]):
            tree = plan.chunks[at // pairs]
            place, target = tree.places[0, at % pairs], tree.targets[0, at % pairs]
            assert target == ids[depth]
            before = np.arange(len(tree.tokens[0])) < place  # the place itself is numbered from 1
            line = before & (tree.ends[0] >= place)
            assert tree.tokens[0][line].tolist() == list(ids[:depth])
            assert tree.depths[0][line].tolist() == list(range(1, depth + 1))


def test_inner_tokens_are_the_distinct_beginnings():
    given = draw(500)
    beginnings = {ids[:depth] for ids in given for depth in range(1, len(ids))}
    whole = make_plan([given], 10_000)
    assert inner(whole) == len(beginnings) and len(whole.chunks) == 1
    cut = make_plan([given], 64)
    assert all((chunk.tokens > 0).sum() <= 64 for chunk in cut.chunks)
    # A chunk repeats the ancestors of its first candidate, at most.
    assert len(beginnings) <= inner(cut) <= len(beginnings) + (LONGEST - 1) * len(cut.chunks)


def inner(plan):
    return sum(int((chunk.tokens > 0).sum()) for chunk in plan.chunks)


def test_chunks_are_about_equally_large():
    plan = make_plan([draw(500)], 128)
    sizes = [int((chunk.tokens > 0).sum()) for chunk in plan.chunks]
    assert len(sizes) > 2 and min(sizes) > 0.7 * max(sizes)


def test_sizes_are_few():
    assert [round_up(n) for n in (0, 1, 8, 9, 33, 64, 65, 200)] == [0, 8, 8, 16, 64, 64, 128, 256]


def test_plans_of_other_lists_can_be_padded_alike():
    given = [(5, 6), (5, 7), (8, 5, 6)]
    pad_to = Sizes(chunks=3, inner=64, pairs=128)
    alone, padded = make_plan([given]), make_plan([given], pad_to=pad_to)
    assert padded.sizes == pad_to and make_plan([[(4,)]], pad_to=pad_to).sizes == pad_to
    assert make_plan([given], pad_to=Sizes()).sizes == alone.sizes
    for plan in (alone, padded):
        targets = np.concatenate([tree.targets[0] for tree in plan.chunks])
        found = [
            tuple(targets[path[:n]]) for path, n in zip(plan.paths[0], plan.counts[0], strict=True)
        ]
        assert found == given


@pytest.mark.parametrize("count", [5, 1000])
def test_scores_are_those_of_whole_rows(small, count):
    candidates, expected = small.brute
    candidates, expected = candidates[:count], expected[:, :count]
    batches = [slice(start, start + BATCH) for start in range(0, QUESTIONS, BATCH)]
    found = np.concatenate([small.rank([candidates], batch=small.rows(rows)) for rows in batches])
    assert found.shape == (QUESTIONS, count) and found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-4
    # The same order for each question, but among candidates that rounding makes equal.
    ordered = np.take_along_axis(expected, np.argsort(-found, axis=1), axis=1)
    assert np.diff(ordered, axis=1).max(initial=-np.inf) < NOISE
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    assert count < 100 or len(set(found.argmax(axis=1).tolist())) > 1  # questions differ


@pytest.mark.parametrize("nodes", [1, 7, 32])
def test_chunks_change_nothing(small, nodes):
    candidates = small.draw(60)
    expected = small.rank([candidates])
    found = small.rank([candidates], nodes)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NOISE)


def test_blocks_of_logits_change_nothing(small, monkeypatch):
    candidates = small.draw(60)
    expected = small.rank([candidates])
    ranking.tree_logprobs.clear_cache()
    # 13 inner tokens a block: the last one is padded.
    monkeypatch.setattr(ranking, "LOGITS", 13 * BATCH * small.variant.llm.vocab)
    np.testing.assert_allclose(small.rank([candidates]), expected, rtol=0, atol=NOISE)
    ranking.tree_logprobs.clear_cache()


def test_padding_and_neighbours_change_nothing(small):
    candidates, batch = small.draw(60), small.rows(slice(BATCH))
    expected = small.rank([candidates])
    longer = {
        name: np.pad(leaf, ((0, 0), (0, 5))) if leaf.ndim == 2 else leaf
        for name, leaf in read_text(small.variant, batch).items()
    }
    longer["tokens"] = np.where(longer["mask"], longer["tokens"], 3)
    longer = to_answer(lay_out(small.variant, longer))
    np.testing.assert_allclose(small.rank([candidates], batch=longer), expected, rtol=0, atol=NOISE)
    others = small.rows(slice(BATCH, 2 * BATCH))
    mixed = {name: np.concatenate([batch[name][:1], others[name][1:]]) for name in batch}
    found = small.rank([candidates], batch=mixed)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=NOISE)
    assert np.abs(found[1:] - expected[1:]).max() > 0.1


def test_each_question_may_have_its_own_candidates(small):
    """Some have chunks that others lack."""
    every, rng = small.draw(60), np.random.default_rng(0)
    picked = [rng.permutation(60)[: rng.integers(1, 40)] for _ in range(BATCH)]
    found = small.rank([[every[at] for at in each] for each in picked], nodes=16)
    assert found.shape == (BATCH, max(map(len, picked)))
    for row, expected in enumerate(small.rank([every])):
        own = picked[row]
        np.testing.assert_allclose(found[row, : len(own)], expected[own], rtol=0, atol=NOISE)
        assert np.all(found[row, len(own) :] == -np.inf)


def test_length_normalise_divides_by_the_tokens(small):
    candidates = small.draw(60)
    lengths = np.array([len(ids) for ids in candidates], np.float32)
    found = small.rank([candidates], length_normalise=True)
    np.testing.assert_allclose(found, small.rank([candidates]) / lengths[None], rtol=1e-6)


def test_different_texts_of_the_same_ids_are_found():
    lists = [["<", "{", "a", "<"], ["a", "b"], ["{", "<"]]
    ids = [[(2, 1), (2, 1), (5, 1), (2, 1)], [(5, 1), (6, 1)], [(2, 1), (2, 1)]]
    same = same_tokens(lists, ids)
    assert same == [("<", "{"), ("{", "<")]
    assert "'<', '{'; '{', '<'. The tokenizer does not know" in describe_same(same)
    assert "and 7 more sets" in describe_same([("a", "b")] * 10)
