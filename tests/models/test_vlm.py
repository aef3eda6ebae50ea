"""The whole model on random weights: shapes, independence of padding and neighbours, dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.data.spec import example_batch
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.vlm import VisionLanguageModel, init_params, param_shapes
from tests.helpers.numerics import error, random_params, small
from tests.helpers.rows import lay_out

KINDS = ("t5", "vicuna")
LENGTHS = {"qformer": (3, 6, 1), "text": (5, 2, 7), "answer": (1, 4, 3)}


@functools.cache
def params(kind):
    return jax.tree.map(jnp.asarray, random_params(small(kind)))


@functools.cache
def run(kind, dtype=jnp.float32):
    """Logits of training, of the first new token, and of the token after that (id 5)."""
    model = VisionLanguageModel(small(kind), dtype)

    @jax.jit
    def stages(params, batch):
        first, cache = model.apply({"params": params}, batch, 2, method="prefill")
        token = jnp.full((first.shape[0], 1), 5)
        second, _ = model.apply({"params": params}, token, cache, method="decode_step")
        return model.apply({"params": params}, batch), first, second

    return stages


def mixed_batch(kind, frames=1, widths=(6, 7, 4)):
    """Three samples of different lengths; what stands in the padding differs with `widths`."""
    draw = np.random.default_rng(0)
    ids = {name: draw.integers(1, 50, (3, 8)) for name in LENGTHS}
    images = draw.integers(0, 256, (3, frames, 56, 56, 3), np.uint8)
    made = {}
    for (name, lengths), width in zip(LENGTHS.items(), widths, strict=True):
        valid = np.arange(width) < np.array(lengths)[:, None]
        row = np.pad(ids[name], ((0, 0), (0, 8)))[:, :width]
        made[name] = np.where(valid, row, width), valid
    batch = {
        "images": images,
        "qformer_tokens": made["qformer"][0],
        "qformer_mask": made["qformer"][1],
        "tokens": made["text"][0],
        "mask": made["text"][1],
    }
    if kind == "t5":
        batch["decoder_tokens"] = made["answer"][0]
    return lay_out(small(kind), batch)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_neighbours_are_invisible(kind):
    together = run(kind)(params(kind), mixed_batch(kind))
    asked = LENGTHS["answer" if kind == "t5" else "text"]
    wide = mixed_batch(kind, widths=(9, 12, 6))
    for row, count in enumerate(asked):
        alone = run(kind)(params(kind), {key: leaf[row : row + 1] for key, leaf in wide.items()})
        assert error(together[0][row, :count], alone[0][0, :count]) < 1e-5
        assert error(together[1][row], alone[1][0]) < 1e-5
        assert error(together[2][row], alone[2][0]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_any_padding_is_itself(kind):
    together = run(kind)(params(kind), mixed_batch(kind))
    trimmed = {key: leaf[2:] for key, leaf in mixed_batch(kind, widths=(1, 7, 3)).items()}
    alone = run(kind)(params(kind), trimmed)
    count = LENGTHS["answer" if kind == "t5" else "text"][2]
    assert error(together[0][2, :count], alone[0][0]) < 1e-5
    assert error(together[1][2], alone[1][0]) < 1e-5
    assert error(together[2][2], alone[2][0]) < 1e-5


def test_a_causal_model_tells_in_prefill_what_it_tells_in_training():
    whole, first, _ = run("vicuna")(params("vicuna"), mixed_batch("vicuna"))
    for row, length in enumerate(LENGTHS["text"]):
        assert error(first[row, 0], whole[row, length - 1]) < 1e-5


def test_frames_are_looked_at_one_by_one():
    model = VisionLanguageModel(small("t5"))
    look = jax.jit(
        lambda batch: model.apply({"params": params("t5")}, batch, method="visual_vectors")
    )
    batch = mixed_batch("t5", frames=3)
    video = look(batch)
    queries, width = model.variant.visual_tokens, model.variant.llm.width
    assert video.shape == (3, 3 * queries, width)
    one = batch["image_sample"][:, :1]
    frames = [
        look({**batch, "images": batch["images"][:, f : f + 1], "image_sample": one})
        for f in range(3)
    ]
    assert error(video, np.concatenate(frames, axis=1)) < 1e-5
    assert error(frames[0], frames[1]) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near_float32(kind):
    """Both from the same bfloat16 weights.

    bfloat16 has 8 bits, so each rounding is up to 0.4 % of a value; dozens of them in a row, mostly
    independent, come to a few percent of the logits. A wrong cast (statistics, scores or logits in
    bfloat16, an accumulation) shows as tens of percent.
    """
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params(kind))
    exact = run(kind)(
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored), mixed_batch(kind)
    )
    found = run(kind, jnp.bfloat16)(stored, mixed_batch(kind))
    for ours, expected in zip(found, exact, strict=True):
        assert ours.dtype == jnp.float32
        difference = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert 1e-4 < difference < 0.05


def test_float16_is_refused_for_t5():
    model = VisionLanguageModel(small("t5"), jnp.float16)
    with pytest.raises(ValueError, match="T5 cannot compute in float16.*bfloat16 or float32"):
        model.apply({"params": {}}, jnp.zeros((1, 1, 56, 56, 3)), method="encode_image")


@pytest.mark.parametrize("name", ["instructblip-flan-t5-xxl", "instructblip-vicuna-13b"])
def test_released_sizes_give_logits(name):
    variant = get_variant(name)
    model, batch = (
        VisionLanguageModel(variant, jnp.bfloat16),
        example_batch(variant, batch=2, text=5, answer=5),
    )
    apply = lambda params, batch: model.apply({"params": params}, batch)
    logits = jax.eval_shape(apply, param_shapes(variant), batch)
    assert (logits.shape, logits.dtype) == ((2, 5, variant.llm.vocab), jnp.float32)


def test_initial_parameters_give_finite_logits():
    made = jax.jit(functools.partial(init_params, small("t5")))(jax.random.key(0))
    logits, *_ = run("t5")(made, mixed_batch("t5"))
    assert jnp.isfinite(logits).all()
    assert jnp.abs(logits).max() < 100
