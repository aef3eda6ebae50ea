import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.inference import decode
from jax_instructblip.inference.batching import compacted
from jax_instructblip.inference.decode import generate_tokens, stream_tokens
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.sampling import (
    TracedSettings,
    penalise,
    sample,
    truncate,
)
from jax_instructblip.models.vlm import VisionLanguageModel
from tests.helpers.compile_counter import count_compiles
from tests.helpers.numerics import random_params, small
from tests.helpers.rows import lay_out, read_text, to_answer

NEW = 16  # tokens of an answer
LENGTHS = (3, 9, 1, 6)  # tokens of the prompts
# What these random models say now and then.
IDS = {
    "t5": {"llm.eos_id": 13, "llm.decoder_start_id": 55},
    "vicuna": {"llm.eos_id": 9},
}


# Images and texts of both kinds are laid out alike: answering reads nothing that training adds.
SIZES = small("vicuna")


@pytest.fixture(scope="module", params=("t5", "vicuna"))
def model(request):
    variant = small(request.param).replace(**IDS[request.param], **{"llm.pad_id": 0})
    return VisionLanguageModel(variant), random_params(variant)


def make_batch(lengths=LENGTHS, padded=9, frames=1, padding="end") -> dict[str, np.ndarray]:
    """Row i is the same, whatever the other rows and the padded length are."""
    rows = []
    for row, length in enumerate(lengths):
        rng = np.random.default_rng([row, length])
        rows.append((rng.integers(3, 50, length), rng.integers(0, 256, (frames, 56, 56, 3))))
    tokens = np.zeros((len(lengths), padded), np.int32)
    mask = np.zeros((len(lengths), padded), bool)
    for row, (ids, _) in enumerate(rows):
        places = {
            "end": range(len(ids)),
            "start": range(padded - len(ids), padded),
            "holes": np.linspace(0, padded - 1, len(ids)).astype(int),
        }[padding]
        tokens[row, places], mask[row, places] = ids, True
    images = np.stack([pixels for _, pixels in rows]).astype(np.uint8)
    given = {
        **{"images": images, "tokens": tokens, "mask": mask},
        **{"qformer_tokens": tokens, "qformer_mask": mask},
    }
    return to_answer(lay_out(SIZES, given))


def rows_of(batch, rows):
    return {name: leaf[rows] for name, leaf in batch.items()}


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def generate(model, batch, **settings):
    rows = len(batch["tokens"])
    made = generate_tokens(
        *model, batch, keys(rows), GenerationConfig(max_new_tokens=NEW, **settings)
    )
    return jax.tree.map(np.asarray, made)


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, make_batch())


def assert_same(made, expected, atol=1e-5):
    for name in ("tokens", "lengths"):
        assert made[name].tolist() == expected[name].tolist()
    np.testing.assert_allclose(made["logprobs"], expected["logprobs"], rtol=0, atol=atol)


def test_shapes(model, greedy):
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in greedy.items()} == {
        "tokens": ((4, 1, NEW), "int32"),
        "lengths": ((4, 1), "int32"),
        "logprobs": ((4, 1, NEW), "float32"),
        "steps": ((), "int32"),
    }


def test_rows_end_with_their_eos_and_padding_follows(model, greedy):
    llm = model[0].variant.llm
    lengths = greedy["lengths"][:, 0]
    assert len(set(lengths)) > 1 and min(lengths) < NEW  # or nothing here is tested
    for tokens, logprobs, length in zip(
        greedy["tokens"][:, 0], greedy["logprobs"][:, 0], lengths, strict=True
    ):
        assert llm.eos_id not in tokens[: length - 1]
        assert length == NEW or tokens[length - 1] == llm.eos_id
        assert (tokens[length:] == llm.pad_id).all()
        assert (logprobs[:length] < 0).all() and (logprobs[length:] == 0).all()


def test_the_loop_stops_when_all_rows_have_ended(model, greedy):
    lengths = greedy["lengths"][:, 0]
    shortest = int(np.argmin(lengths))
    alone = generate(model, rows_of(make_batch(), [shortest] * 4))
    assert alone["steps"] == lengths[shortest] < NEW
    assert greedy["steps"] == lengths.max()


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 3.0, "min_new_tokens": NEW}])
def test_tokens_and_logprobs_are_those_of_the_whole_rows(model, settings):
    """The cached steps against one pass over prompt and answer; logprobs whatever the settings."""
    network, params = model
    made = generate(model, make_batch(), **settings)
    batch, tokens = read_text(SIZES, make_batch()), made["tokens"][:, 0]
    llm = network.variant.llm
    if llm.kind == "t5":
        start = llm.decoder_start_id
        batch["decoder_tokens"] = np.pad(tokens, ((0, 0), (1, 0)), constant_values=start)[:, :-1]
        after = np.tile(np.arange(NEW), (len(LENGTHS), 1))
    else:
        rows = [
            [*row[:n], *new] for row, n, new in zip(batch["tokens"], LENGTHS, tokens, strict=True)
        ]
        width = max(map(len, rows))
        batch["tokens"] = np.array([[*row, *[0] * (width - len(row))] for row in rows])
        batch["mask"] = np.arange(width) < np.array([len(row) for row in rows])[:, None]
        after = np.array(LENGTHS)[:, None] - 1 + np.arange(NEW)
    logits = np.asarray(whole_rows(network, params, lay_out(network.variant, batch)))
    logits = np.take_along_axis(logits, after[..., None], axis=1)  # [B, NEW, V]
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    for row, length in enumerate(made["lengths"][:, 0]):
        own = np.take_along_axis(logprobs[row], tokens[row][:, None], axis=-1)[:length, 0]
        np.testing.assert_allclose(made["logprobs"][row, 0, :length], own, rtol=0, atol=1e-5)
        if not settings:
            assert logits[row].argmax(-1)[:length].tolist() == tokens[row, :length].tolist()


@functools.partial(jax.jit, static_argnums=0)
def whole_rows(network, params, batch):
    return network.apply({"params": params}, batch)


def test_a_row_does_not_depend_on_its_neighbours_or_on_padding(model, greedy):
    for row in range(len(LENGTHS)):
        alone = generate(model, rows_of(make_batch(), [row]))
        assert_same(alone, rows_of_made(greedy, [row]))
    # Without any padding: a program for the length of this row.
    row = int(np.argmin(LENGTHS))
    alone = generate(model, bare(row))
    assert_same(alone, rows_of_made(greedy, [row]))
    assert_same(generate(model, make_batch(padded=24)), greedy)


def bare(row):
    """The answer to a row alone, without padding."""
    given = read_text(SIZES, rows_of(make_batch(), [row]))
    cut = {name: leaf[:, : LENGTHS[row]] for name, leaf in given.items() if name != "images"}
    return to_answer(lay_out(SIZES, given | cut))


def rows_of_made(made, rows):
    return {name: made[name][rows] for name in ("tokens", "lengths", "logprobs")}


@pytest.mark.parametrize("padding", ["start", "holes"])
def test_compacted_input_gives_the_same(model, greedy, padding):
    batch = make_batch(padding=padding, padded=9)
    assert (np.diff(batch["segments"]) > 0).any()
    assert_same(generate(model, compacted(batch)), greedy, atol=0)


def test_min_new_tokens_masks_eos_until_then(model, greedy):
    shortest = int(greedy["lengths"].min())
    made = generate(model, make_batch(), min_new_tokens=shortest)
    assert made["lengths"].min() > shortest
    made = generate(model, make_batch(), min_new_tokens=NEW)
    assert not (made["tokens"] == model[0].variant.llm.eos_id).any()
    assert_same(generate(model, make_batch(), min_new_tokens=shortest - 1), greedy, atol=0)


def test_repetition_penalty_counts_what_was_generated(model, greedy):
    repeats = [len(row[:n]) - len(set(row[:n])) for row, n in of_rows(greedy)]
    made = generate(model, make_batch(), repetition_penalty=1e4)
    assert max(repeats) > 0
    assert all(len(set(row[:n])) == n for row, n in of_rows(made))
    llm = model[0].variant.llm
    if llm.kind == "t5":  # its start id counts as generated
        assert (greedy["tokens"] == llm.decoder_start_id).any()
        assert not (made["tokens"] == llm.decoder_start_id).any()


def of_rows(made):
    lengths = made["lengths"][:, 0]
    return [(row.tolist(), n) for row, n in zip(made["tokens"][:, 0], lengths, strict=True)]


def test_penalise():
    scores = jnp.array([[2.0, -2.0, 3.0, -3.0]])
    seen = jnp.array([[True, True, False, False]])
    assert penalise(scores, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, -3.0]]


LOG_CHANCES = np.log([[0.5, 0.3, 0.15, 0.05]]).astype(np.float32)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.49}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.81}, [0, 1, 2]),
        ({"top_p": 1e-9}, [0]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        # After top-k the two left have 0.625 and 0.375, of which the first alone reaches 0.6.
        ({"top_k": 2, "top_p": 0.6}, [0]),
        # Temperature comes first: it evens the chances out, and more are needed to reach 0.51.
        ({"temperature": 100.0, "top_p": 0.51}, [0, 1, 2]),
        ({"temperature": 0.1, "top_p": 0.95}, [0]),
    ],
)
def test_truncate(settings, kept):
    settings = TracedSettings(**settings)
    ranked = truncate(jnp.array(LOG_CHANCES), settings)
    assert np.flatnonzero(ranked[0] > -np.inf).tolist() == kept
    np.testing.assert_allclose(
        ranked[0, jnp.array(kept)], LOG_CHANCES[0, kept] / settings.temperature, rtol=1e-6
    )


def test_ties_with_the_last_of_top_k_stay():
    ranked = truncate(jnp.array([[1.0, 0.0, 0.0, -1.0]]), TracedSettings(top_k=2))
    assert np.flatnonzero(ranked[0] > -np.inf).tolist() == [0, 1, 2]


def test_draws_follow_the_distribution():
    count = 20_000
    chances = np.array([0.05, 0.5, 0.15, 0.3])  # not in order
    tokens = jax.vmap(sample, in_axes=(0, None, None))(
        keys(count), jnp.array(np.log(chances[None])), TracedSettings()
    )
    found = np.bincount(np.asarray(tokens).ravel(), minlength=4) / count
    np.testing.assert_allclose(found, chances, atol=4 * 0.5 / count**0.5)


def test_sampling(model, greedy):
    """All in one test: they share one program."""
    batch = make_batch()

    def sample(batch, seed=0, params=model[1], **settings):
        config = GenerationConfig(max_new_tokens=NEW, do_sample=True, **settings)
        made = generate_tokens(model[0], params, batch, keys(4, seed), config)
        return jax.tree.map(np.asarray, made)

    assert_same(sample(batch, top_k=1), greedy)
    assert_same(sample(batch, top_p=1e-6), greedy)
    assert_same(sample(batch, temperature=1e-4), greedy)
    drawn = sample(batch, temperature=1.5)
    assert (drawn["tokens"] != greedy["tokens"]).any()
    assert_same(sample(batch, temperature=1.5), drawn, atol=0)
    assert (sample(batch, seed=1, temperature=1.5)["tokens"] != drawn["tokens"]).any()

    # A row draws by its own key: other neighbours change nothing.
    other = rows_of(batch, [0, 1, 1, 1])
    assert_same(rows_of_made(sample(other, temperature=1.5), [0, 1]), rows_of_made(drawn, [0, 1]))
    # Equal rows draw differently, the second time as well.
    same = sample(rows_of(batch, [0, 0, 0, 0]), temperature=1.5)["tokens"][:, 0]
    assert len({tuple(row[:4]) for row in same.tolist()}) > 1
    # Each step draws anew: of tokens that are all as likely, not the same one for ever.
    blank = jax.tree.map(np.zeros_like, model[1]["llm"]["head"])
    level = {**model[1], "llm": {**model[1]["llm"], "head": blank}}
    made = sample(batch, params=level, min_new_tokens=NEW)["tokens"][:, 0]
    assert all(len(set(row)) > NEW // 2 for row in made.tolist())


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_k": 9}])
def test_streamed_tokens_are_those_of_the_whole_loop(model, settings):
    expected = generate(model, make_batch(), **settings)
    config = GenerationConfig(max_new_tokens=NEW, **settings)
    parts = list(stream_tokens(*model, make_batch(), keys(4), config))
    assert len(parts) == expected["steps"]  # it ends with the last row's eos
    tokens, logprobs = (np.stack(each, axis=1) for each in zip(*parts, strict=True))
    assert tokens.tolist() == expected["tokens"][:, 0, : len(parts)].tolist()
    np.testing.assert_allclose(logprobs, expected["logprobs"][:, 0, : len(parts)], atol=1e-5)


def test_one_program_for_all_settings(model, greedy):
    batch = make_batch()
    sampling = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_new_tokens": 2}
    generate(model, batch, **sampling)
    with count_compiles() as compiled:
        generate(model, batch)
        generate(model, batch, repetition_penalty=2, min_new_tokens=3)
        for change in ({"temperature": 2}, {"top_k": None}, {"top_p": 1}, {"min_new_tokens": 0}):
            generate(model, batch, **(sampling | change))
        generate((model[0], random_params(model[0].variant, seed=1)), batch)
    assert len(compiled) == 0
    with count_compiles() as compiled:  # and the counter counts
        generate_tokens(*model, batch, keys(4), GenerationConfig(max_new_tokens=2))
    assert len(compiled) > 0


def test_parameters_are_no_constants_of_the_program(model):
    network, params = model
    traced = decode._decode.trace(
        network,
        2,
        False,
        params,
        make_batch(),
        keys(4),
        TracedSettings(*map(jnp.asarray, TracedSettings())),
        None,
    )
    assert max((np.size(const) for const in traced.jaxpr.consts), default=0) < 100


def test_t5_refuses_float16():
    variant = small("t5")
    with pytest.raises(ValueError, match="float16.*overflow"):
        generate((VisionLanguageModel(variant, jnp.float16), random_params(variant)), make_batch())
