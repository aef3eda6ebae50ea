"""Scores of candidates against the losses that the original code's `predict_class` recorded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.data.batch import collate
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.data.tokenizer_files import RELEASED_SPECIAL, load_tokenizers
from jax_instructblip.inference.ranking import make_plan, pair_logprobs, score, tokenise
from jax_instructblip.models.vlm import VisionLanguageModel
from tests.helpers import golden
from tests.helpers.numerics import error

TOWER = 1e-4  # a part of the largest score
LIMIT = 40  # tokens that the recorded Q-Former reads: the end of a longer prompt
TEMPLATE = "Image. {} Short answer:"
CONTEXT = ("the river", "a table", "the street")
HISTORY = ("yes, no", "no", "the dog?")
SHARED = {  # the recorded segments of six candidates that all three questions have
    "predict_class": (6,),
    "predict_class_nseg2": (3, 3),
    "predict_class_nseg4": (1, 1, 1, 3),
    "predict_class_b_nseg1": (6,),
    "predict_class_b_nseg2": (3, 3),
    "predict_class_b_nseg3": (2, 2, 2),
    "predict_class_video": (6,),
    "predict_class_context": (6,),
    "predict_class_history_caption": (6,),
}
LISTS = {
    "predict_class_lists": (slice(0, 3), slice(3, 6), slice(1, 4)),
    "predict_class_ragged_lists": (slice(0, 2), slice(2, 6), slice(1, 4)),
}


@dataclasses.dataclass
class Case:
    name: str
    model: VisionLanguageModel
    params: dict
    text: TextProcessor
    given: dict
    recorded: dict

    def rank(self, prompts, candidates, images="image"):
        """Scores [3, C], all questions in one batch."""
        plan = make_plan(tokenise(self.text, candidates, 3))
        made = self.logprobs(self.params, self.batch(prompts, images), plan.chunks)
        return score(plan, jax.device_get(made), False)

    @functools.cached_property
    def logprobs(self):
        return jax.jit(functools.partial(pair_logprobs, self.model))

    def batch(self, prompts, images):
        examples = [self.text.prompt(prompt) for prompt in prompts]
        visual = golden.images(images).shape[1] * self.model.variant.visual_tokens
        batch = collate(
            [
                {"images": frames, **example}
                for frames, example in zip(golden.images(images), examples, strict=True)
            ],
            visual_tokens=self.model.variant.visual_tokens,
            lengths={"slots": 96 + visual, "qformer_tokens": LIMIT},  # one program for all prompts
        )
        del batch["truncated"]
        aware = self.model.variant.qformer.instruction_aware
        assert ("qformer_tokens" in batch) == ("qformer_mask" in batch) == aware
        return batch


@pytest.fixture(scope="module", params=golden.CASES)
def case(request, shared):
    variant, folder = golden.variant(request.param), shared / "golden"
    kind = variant.llm.kind
    if kind == "llama":
        variant = variant.replace(**{"llm.pad_id": 400})
    if not variant.qformer.vocab:  # without a text branch; the tokenizer still has its words
        variant = variant.replace(**{"qformer.vocab": 1000})
    tokenizers = [folder / "tokenizers" / name for name in (kind, "bert")]
    llm, bert = load_tokenizers(*tokenizers, kind, special=RELEASED_SPECIAL[kind])
    with np.load(folder / request.param / "inputs.npz") as file:
        given = {name: file[name].tolist() for name in file}
    params = jax.tree.map(jnp.asarray, golden.params(request.param))
    recorded = golden.outputs(request.param)
    return Case(
        request.param,
        VisionLanguageModel(variant),
        params,
        TextProcessor(variant, llm, bert, qformer_limit=LIMIT),
        given,
        recorded,
    )


def prompts_of(case, tag):
    """Prompts as the original builds them: template, then context, history, caption before it."""
    prompts = [TEMPLATE.format(each) for each in case.given["instructions"]]
    if tag.endswith("_context"):
        return [f"context: {c}. {p}" for c, p in zip(CONTEXT, prompts, strict=True)]
    if tag.endswith("_history_caption"):
        rows = zip(case.given["captions"], HISTORY, prompts, strict=True)
        return [f'This image has the caption "{c}". dialog history: {h}\n{p}' for c, h, p in rows]
    return prompts


def losses(case, tag, call, scores):
    """Our scores `[rows, segment]` as the original's losses of that call.

    T5 sums. Vicuna divides by all shifted positions of the padded rows, which differ from segment
    to segment: the released code then compares what cannot be compared. Ours is its sum.
    """
    if case.model.variant.llm.kind == "t5":
        return -scores
    return -scores / (case.recorded[f"{tag}/call{call}/labels"].shape[1] - 1)


@pytest.mark.parametrize("tag", SHARED)
def test_shared_candidates(case, tag):
    if f"{tag}/rank" not in case.recorded:
        return  # recorded with the instruction branch only
    candidates = case.given["candidates_b" if "_b_" in tag else "candidates"]
    video = "video" if tag.endswith("_video") else "image"
    scores = case.rank(prompts_of(case, tag), candidates, video)
    made, start = [], 0
    for call, size in enumerate(SHARED[tag]):
        made.append(losses(case, tag, call, scores[:, start : start + size]))
        expected = case.recorded[f"{tag}/loss_call{call}"].reshape(3, size)
        assert error(made[-1], expected) < TOWER
        start += size
    order = np.argsort(np.concatenate(made, axis=1), axis=1)
    np.testing.assert_array_equal(order, case.recorded[f"{tag}/rank"])
    if len(made) == 1 or case.model.variant.llm.kind == "t5":
        np.testing.assert_array_equal(np.argsort(-scores, axis=1), order)


@pytest.mark.parametrize("tag", LISTS)
def test_lists_of_their_own(case, tag):
    if f"{tag}/rank" not in case.recorded:
        return  # recorded with the instruction branch only
    lists = [case.given["candidates"][part] for part in LISTS[tag]]
    scores = case.rank(prompts_of(case, tag), lists)
    for row, (own, recorded) in enumerate(zip(lists, case.recorded[f"{tag}/rank"], strict=True)):
        found = scores[row, : len(own)]
        made = losses(case, tag, row, found)
        assert error(made, case.recorded[f"{tag}/loss_call{row}"]) < TOWER
        assert np.argsort(-found).tolist() == recorded[: len(own)].tolist()
        assert np.all(scores[row, len(own) :] == -np.inf)


@pytest.mark.parametrize("tag", ["predict_class", "predict_class_history_caption"])
def test_token_ids(case, tag):
    if f"{tag}/rank" not in case.recorded:
        return  # recorded with the instruction branch only
    labels = case.recorded[f"{tag}/call0/labels"][:6]  # of the first question
    expected = [tuple(row[row != golden.IGNORE].tolist()) for row in labels]
    assert tokenise(case.text, case.given["candidates"], 3) == [expected]
    if case.model.variant.qformer.instruction_aware:
        found = case.batch(prompts_of(case, tag), "image")["qformer_tokens"]
        recorded = case.recorded[f"{tag}/qformer_text_ids"]
        np.testing.assert_array_equal(found[:, 0, : recorded.shape[1]], recorded)
