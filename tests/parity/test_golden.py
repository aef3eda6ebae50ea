"""Against the recorded values of the original code, tower by tower.

Its rows are padded elsewhere than ours (Vicuna answers: between visual prompt and instruction), so
only real positions are compared. Each case is compiled twice: one function gives all that training
gives, gradients included, one all that answering gives.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from tests.helpers import golden
from tests.helpers.numerics import error
from tests.helpers.rows import lay_out, read_text
from tests.helpers.stages import stages

TOWER, LOSS, GRADIENT = 1e-4, 1e-5, 1e-4  # parts of the largest value; the loss absolutely

# The last layer's text outputs are read by nobody.
WITHOUT_GRADIENT = ("text_mlp", "text_mlp_norm")


@pytest.fixture(scope="module", params=golden.CASES)
def case(request, shared):
    return Case(request.param)


class Case:
    """One folder: its sizes, parameters, recorded values, and what we make of its batch."""

    def __init__(self, name: str):
        self.name, self.variant = name, golden.variant(name)
        self.params = jax.tree.map(jnp.asarray, golden.params(name))
        self.recorded = golden.outputs(name)

    def train(self, batch):
        """((loss, values of each stage), gradient of the Q-Former tree)."""
        return stages(self.variant)(self.params["qformer"], self.params, batch)

    @functools.cached_property
    def trained(self):
        return self.train(golden.batch(self.name, "train"))

    @functools.cached_property
    def answer(self):
        """Jitted (params, batch) -> the prompt, the first new token's logits, and the cache."""

        def prefill(model, batch):
            inputs = model.embed_row(batch)
            return inputs, *model.llm.prefill(inputs, batch["segments"] > 0, 4)

        model = VisionLanguageModel(self.variant)
        return jax.jit(lambda params, batch: model.apply({"params": params}, batch, method=prefill))

    @functools.cached_property
    def step(self):
        """Jitted (params, token, cache) -> logits of the next token, and the cache."""
        model = VisionLanguageModel(self.variant)
        return jax.jit(
            lambda params, token, cache: model.apply(
                {"params": params}, token, cache, method="decode_step"
            )
        )


def test_the_tree_is_the_one_the_model_asks_for(case):
    shape = lambda leaf: leaf.shape
    assert jax.tree.map(shape, case.params) == jax.tree.map(shape, param_shapes(case.variant))


def test_patch_features_and_image_norm(case):
    _, made = case.trained[0]
    assert error(made["image_norm"], case.recorded["vit/ln_vision"]) < TOWER


def test_qformer(case):
    _, made = case.trained[0]
    recorded = case.recorded["train/qformer_last_hidden"][:, : case.variant.visual_tokens]
    assert error(made["queries"], recorded) < TOWER


def test_prompt_of_the_language_model(case):
    _, made = case.trained[0]
    for ours, theirs in _real_rows(case, "train", made["prompt"], "llm_inputs_embeds"):
        assert error(ours, theirs) < TOWER


def test_encoder(case):
    if case.variant.llm.kind != "t5":
        return  # a decoder alone
    _, made = case.trained[0]
    for ours, theirs in _real_rows(case, "train", made["encoded"], "encoder_out"):
        assert error(ours, theirs) < TOWER


@pytest.mark.parametrize("tag", ["train", "train_trunc_in6_out5"])
def test_logits_and_loss(case, tag):
    if f"{tag}/loss" not in case.recorded:
        return  # recorded with the instruction branch only
    batch = golden.batch(case.name, tag)
    if tag != "train":  # at the lengths of 'train': no second compilation, and padding is invisible
        batch = _as_long_as(case.variant, golden.batch(case.name, "train"), batch)
    (loss, made), _ = case.train(batch)
    assert abs(loss - case.recorded[f"{tag}/loss"]) < LOSS
    logits, recorded = made["logits"], case.recorded[f"{tag}/logits"]
    if case.variant.llm.kind == "t5":
        for ours, theirs, targets in zip(logits, recorded, batch["targets"], strict=True):
            count = (targets != golden.IGNORE).sum()
            assert error(ours[:count], theirs[:count]) < TOWER
    else:
        skip = case.variant.visual_tokens
        valid = case.recorded[f"{tag}/llm_attention_mask"] > 0
        for ours, theirs, visible in zip(logits, recorded, valid, strict=True):
            theirs = theirs[visible][skip:]
            assert error(ours[: len(theirs)], theirs) < TOWER


def test_gradients(case):
    _, found = case.trained
    recorded = golden.gradients(case.name)
    top = max(np.abs(leaf).max() for leaf in jax.tree.leaves(recorded))
    for path, expected in jax.tree_util.tree_leaves_with_path(recorded):
        names = [step.key for step in path]
        ours = functools.reduce(lambda tree, name: tree[name], names, found)
        assert ours.shape == expected.shape, names
        assert np.abs(ours - expected).max() < GRADIENT * top, names
        if "key" in names and names[-1] == "bias":
            # softmax does not see what is added to all scores of a query: this is rounding noise
            assert np.abs(ours).max() < 1e-6 * top, names
        elif "plain" in names and set(names) & set(WITHOUT_GRADIENT):
            assert not np.any(ours[-1]) and not np.any(expected[-1]), names
            assert np.any(expected[:-1]), names
        else:
            assert all(np.any(part) for part in (expected if "layers" in names else [expected]))


def test_gradient_norms(case):
    groups = {
        "query_tokens": ("queries",),
        "ln_vision": ("image_norm",),
        "t5_proj" if case.variant.llm.kind == "t5" else "llm_proj": ("projection",),
    }
    _, found = case.trained
    named = [name for names in groups.values() for name in names]
    groups["Qformer"] = tuple(name for name in found if name not in named)
    groups["ALL"] = tuple(found)
    for group, names in groups.items():
        leaves = jax.tree.leaves([found[name] for name in names])
        norm = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in leaves))
        recorded = case.recorded[f"train/gradnorm/{group}"]
        assert abs(norm - recorded) < GRADIENT * recorded, group


@pytest.mark.parametrize("tag", ["generate", "generate_video"])
def test_prompt_and_first_three_steps_of_answering(case, tag):
    batch = golden.batch(case.name, tag)
    prompt, logits, cache = case.answer(case.params, batch)
    skip = batch["images"].shape[1] * case.variant.visual_tokens
    recorded = case.recorded[f"{tag}/inputs_embeds"][:, :skip]
    assert error(prompt[:, :skip], recorded) < TOWER
    ids = case.recorded[f"{tag}/greedy/ids"]  # the first one is the start, never predicted
    for step in range(3):
        theirs = case.recorded.get(f"{tag}/greedy/scores_step{step}")
        if theirs is None:
            break  # all samples had ended
        assert error(logits[:, 0], theirs) < TOWER
        logits, cache = case.step(case.params, ids[:, step + 1 : step + 2], cache)


def _real_rows(case, tag, ours, name):
    valid = case.recorded[f"{tag}/llm_attention_mask"] > 0
    for row, theirs, visible in zip(ours, case.recorded[f"{tag}/{name}"], valid, strict=True):
        yield row[: visible.sum()], theirs[visible]


def _as_long_as(variant, like, batch):
    """`batch` padded at the end of its rows to the shapes of `like`."""
    value = {"targets": golden.IGNORE}
    like, batch = read_text(variant, like), read_text(variant, batch)
    given = {
        name: leaf
        if name == "images"
        else np.pad(
            leaf,
            ((0, 0), (0, like[name].shape[1] - leaf.shape[1])),
            constant_values=value.get(name, 0),
        )
        for name, leaf in batch.items()
    }
    return lay_out(variant, given)
