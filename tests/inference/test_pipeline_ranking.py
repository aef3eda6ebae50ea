"""Ranking through `load`: of pictures and words, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_instructblip
from jax_instructblip.data.batch import IGNORE, collate
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from tests.helpers.compile_counter import count_compiles
from tests.helpers.interpreter import run_python
from tests.helpers.tiny import COLORS, QUESTION, spoil_logits
from tests.inference.test_ranking import NOISE


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (28, 28, 3), np.uint8) for _ in range(count)]


def test_rank_is_the_logprob_of_a_training_answer(blip):
    candidates, images = [*COLORS, "red green", "red green blue"], pictures(2)
    found = blip.rank(images, [QUESTION], candidates)
    assert found.shape == (2, 6) and found.dtype == np.float32
    asked = [(image, candidate) for image in images for candidate in candidates]
    batch = collate(
        [{"images": image[None], **blip.text.example(QUESTION, each)} for image, each in asked],
        visual_tokens=blip.variant.visual_tokens,
    )
    del batch["truncated"]
    targets = batch["targets"]
    logprobs = jax.nn.log_softmax(blip.logits(batch))
    each = jnp.take_along_axis(logprobs, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    counted = targets != IGNORE
    if not blip.variant.llm.encoder_decoder:  # trained with a closing eos, ranked without
        counted &= targets != blip.variant.llm.eos_id
    expected = np.where(counted, each, 0).sum(axis=1).reshape(2, 6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_lists_batches_and_duplicates(blip):
    lists = [["red", "green", "red"], ["blue"], ["white", "red green"]]
    found = blip.rank(pictures(3), [QUESTION], lists, batch_size=2)
    assert found.shape == (3, 3) and found[0, 0] == found[0, 2]
    assert np.isneginf(found).tolist() == [[False] * 3, [False, True, True], [False, False, True]]
    every = ["red", "green", "blue", "white", "red green"]
    shared = blip.rank(pictures(3), [QUESTION], every, batch_size=2)
    expected = [[shared[0, 0], shared[0, 1], shared[0, 0]], [shared[1, 2]], shared[2, 3:].tolist()]
    for row, values in enumerate(expected):
        np.testing.assert_allclose(found[row, : len(values)], values, rtol=0, atol=NOISE)


def test_another_image_and_another_list_compile_nothing(blip):
    blip.rank(pictures(2), [QUESTION], ["red", "green blue"])
    with count_compiles() as compiled:
        blip.rank(pictures(2, seed=1), [QUESTION], ["white red", "blue", "green"])
    assert len(compiled) == 0
    with count_compiles() as compiled:  # the guard sees a larger tree
        blip.rank(pictures(2), [QUESTION], [f"red {' '.join(['blue'] * n)}" for n in range(20)])
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ("red", "candidates is a str, expected a list"),
        ([], "candidates is empty"),
        (["red", " ", ""], "candidate 1 is empty; candidate 2 is empty"),
        (["red", 3], "candidate 1 is a int, expected a string"),
        (["red", ["green"]], "candidate 1 is a list, expected a string"),
        ([["red"]] * 3, "3 lists of candidates and 2 questions do not match"),
        ([["red"], []], "question 1 has no candidates"),
        ([["red"], ["", "red"]], "candidate 0 of question 1 is empty"),
        (
            ["red", "red" + " red" * 299],
            r"1 to 256 tokens: candidate 1 \('red red .*'\) has 300 tokens",
        ),
    ],
)
def test_wrong_candidates_are_named(blip, candidates, message):
    if "300" in message and blip.variant.llm.kind == "t5":
        message = message.replace("1 to", "2 to").replace("300 tokens", "301 tokens")
    with pytest.raises(ValueError, match=message):
        blip.rank(pictures(2), [QUESTION], candidates)


def test_a_candidate_without_words_has_no_token_or_eos_alone(blip, monkeypatch):
    """A tokenizer that drops control characters leaves nothing of them."""
    ids = blip.text.candidate("red")[:0]
    if blip.variant.llm.kind == "t5":
        ids = np.append(ids, blip.variant.llm.eos_id)
    monkeypatch.setattr(type(blip.text), "candidate", lambda self, text: ids)
    with pytest.raises(ValueError, match=rf"candidate 0 \('x'\) has {len(ids)} tokens"):
        blip.rank(pictures(1), [QUESTION], ["x"])


@pytest.mark.parametrize("folder", ["llama"], indirect=True)  # T5 has no last position
def test_candidates_that_the_cache_cannot_hold(blip):
    narrow = blip.variant.replace(**{"llm.max_positions": 20})
    text = dataclasses.replace(blip.text, variant=narrow)
    short = InstructBlipPipeline(narrow, blip.params, text)
    assert short.rank(pictures(1), ["red"], ["red blue"]).shape == (1, 1)
    with pytest.raises(ValueError, match=r"13 new tokens .*longest candidate\).* at most 12"):
        short.rank(pictures(1), ["red"], ["blue", "red" + " red" * 12])
    with pytest.raises(ValueError, match=r"may have 1 tokens .* and 12 of the answer\): prompt 0"):
        short.rank(pictures(1), [QUESTION], ["red" + " red" * 11])


def test_scores_that_are_not_finite_are_an_error(folder):
    broken = jax_instructblip.load(folder)
    spoil_logits(broken.params["llm"], jnp.nan)
    with pytest.raises(ValueError, match=r"scores of questions \[0, 1\] are not finite"):
        broken.rank(pictures(2), [QUESTION], ["red", "blue"])


@pytest.mark.parametrize("folder", ["llama"], indirect=True)  # T5's trees are split alike
def test_over_a_mesh(folder, blip):
    """Two devices, in a process of their own: the same scores, shared list or not."""
    lists = [["red"], ["green", "red blue white"], ["blue red"]]
    code = f"""
import json, jax, jax_instructblip
from jax_instructblip.parallel.mesh import make_mesh
from tests.inference.test_pipeline_ranking import QUESTION, pictures
assert jax.device_count() == 2
blip = jax_instructblip.load({str(folder)!r}, mesh=make_mesh())
for candidates in ({lists!r}, {lists[1]!r}):
    print(json.dumps(blip.rank(pictures(3), [QUESTION], candidates).tolist()))
"""
    found = run_python(code, devices=2)
    for candidates, line in zip((lists, lists[1]), found.splitlines(), strict=True):
        expected = blip.rank(pictures(3), [QUESTION], candidates)
        np.testing.assert_allclose(json.loads(line), expected, rtol=0, atol=NOISE)


@pytest.mark.parametrize("folder", ["t5", "llama"], indirect=True)  # OPT's knows every byte
def test_candidates_that_the_tokenizer_cannot_tell_apart_are_named(blip, caplog):
    blip.rank(pictures(1), [QUESTION], ["red", "green"])
    assert "the same tokens" not in caplog.text
    scores = blip.rank(pictures(1), [QUESTION], ["red", "\u732b", "\u72ac", "red"])
    assert scores[0, 1] == scores[0, 2]
    assert "different candidates have the same tokens" in caplog.text
    assert "'\u732b', '\u72ac'." in caplog.text
