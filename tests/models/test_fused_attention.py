"""cuDNN's attention: what it is given, where it is called, and its programs for GPUs."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from jax_instructblip.models.attention import attend, fusible
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.masks import causal_mask
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning.topology import has_cuda
from jax_instructblip.training.setup import read_scans
from tests.helpers.interpreter import run_module
from tests.helpers.multi_device import divisible
from tests.helpers.numerics import error
from tests.helpers.tiny import make_batch

SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2, 0, 0]])
REAL = jax.nn.dot_product_attention


def inputs(key_heads=4, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.standard_normal((2, 8, heads, 16)), dtype)
    return draw(4), draw(key_heads), draw(key_heads)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the queries of all calls of cuDNN, which XLA answers in its place."""
    found = []

    def answer(query, key, value, *, implementation, **options):
        assert implementation == "cudnn"
        found.append(query.shape)
        return REAL(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return found


def gradients(fused, masked, scale, *factors):
    """Values of attention, and gradients of a weighted sum of them, in float32."""
    mask = causal_mask(SEGMENTS) if masked else None
    take = functools.partial(attend, mask=mask, scale=scale, fused=fused)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(factors[0].shape))
    loss = lambda *factors: (take(*factors).astype(jnp.float32) * weights).sum()
    out = take(*factors), *jax.grad(loss, (0, 1, 2))(*factors)
    return [np.asarray(leaf.astype(jnp.float32)) for leaf in out]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(("masked", "scale"), [(True, None), (False, 1.0)])
def test_cudnn_is_asked_for_what_the_einsums_compute(calls, key_heads, masked, scale):
    factors = inputs(key_heads)
    found = gradients(True, masked, scale, *factors)
    assert calls == [(2, 8, 4, 16)] * 2
    for each, other in zip(found, gradients(False, masked, scale, *factors), strict=True):
        assert error(each, other) < 0.02  # roundings to 8 bits


def test_what_cudnn_cannot_take_stays_with_the_einsums():
    query, key, _ = inputs()
    mask, ones = causal_mask(SEGMENTS), jnp.ones((1, 4, 8, 8))
    assert fusible(query, key, mask, None, None) and fusible(query, key, None, None, None)
    assert fusible(query.astype(jnp.float16), key, None, None, None)
    assert not fusible(query.astype(jnp.float32), key, None, None, None)
    assert not fusible(query, key, mask, ones, None)  # T5's bias is learned
    assert not fusible(query, key, mask, None, lambda weights: weights)
    assert fusible(query[:, :7], key, None, None, None)
    assert not fusible(query[:, :7], key, mask[:, :, :7], None, None)
    assert not fusible(query, key[:, :7], mask[..., :7], None, None)
    assert not fusible(query[..., :12], key, None, None, None)
    wide = jnp.zeros((1, 2, 1, 136), jnp.bfloat16)
    assert not fusible(wide, wide, None, None, None)


@pytest.mark.parametrize(
    ("kind", "dropout", "rows"),
    [("llama", 0.0, True), ("llama", 0.1, False), ("opt", 0.1, True), ("t5", 0.0, False)],
)
def test_vision_and_decoder_only_models_call_it(calls, kind, dropout, rows):
    sizes = {"vision.width": 32, "qformer.vision_width": 32, "llm.dropout": dropout}
    variant = divisible(kind, **sizes)
    scan = Scan(fused=True)
    model = VisionLanguageModel(variant, jnp.bfloat16, Scans(scan, scan, scan))
    batch = jax.tree.map(jnp.asarray, make_batch(variant, 2, text=10))
    assert batch["tokens"].shape[1] % 2 == 0
    rng = jax.random.key(0)
    apply = lambda params: model.apply({"params": params}, batch, train=True, rngs={"dropout": rng})
    jax.eval_shape(apply, param_shapes(variant))
    images = (2, variant.vision.tokens, 4, 8)
    assert set(calls) == {images, *([(*batch["tokens"].shape, 4, 8)] if rows else [])}


def test_only_nvidias_gpus_since_a100_have_it():
    scans = Scans(Scan(fused=True), Scan("dots"), Scan("full", fused=True))
    device = lambda platform, **fields: types.SimpleNamespace(platform=platform, **fields)
    for capability in ("8.0", "9.0", "10.0"):
        assert scans.on(device("gpu", compute_capability=capability)) is scans
    off = Scans(Scan(), Scan("dots"), Scan("full"))
    assert scans.on(jax.devices("cpu")[0]) == off
    assert scans.on(device("tpu")) == scans.on(device("gpu")) == off
    assert scans.on(device("gpu", compute_capability="7.5")) == off


def test_runs_ask_for_it_on_their_own_devices_alone():
    config = common.get_config()
    assert not any(scan.fused for scan in vars(read_scans(config, None)).values())
    config.model.attention = "auto"
    assert all(scan.fused for scan in vars(read_scans(config, None)).values())  # for a plan
    assert not any(scan.fused for scan in vars(read_scans(config, make_mesh())).values())


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("masked", "key_heads"), [(True, 4), (False, 4), (True, 2)])
def test_cudnn_gives_what_the_einsums_give(masked, key_heads):
    factors = inputs(key_heads)
    found = gradients(True, masked, None, *factors)
    for each, other in zip(found, gradients(False, masked, None, *factors), strict=True):
        assert error(each, other) < 0.02  # roundings to 8 bits


@pytest.mark.full
@pytest.mark.skipif(not has_cuda(), reason="needs the CUDA compiler: pip install -e .[gpu]")
def test_programs_for_gpus_hold_no_scores_and_need_no_collectives():
    found = json.loads(run_module("tests.helpers.fused", devices=8).splitlines()[-1])
    product = 2 * 8 * 32 * 32 * 4 * 16  # of 8 rows of 32 slots with 4 heads of 16
    assert found["fused"]["flops"] == (2 + 5) * product  # scores are computed again
    assert found["einsum"]["flops"] == (2 + 4) * product
    calls = ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]
    assert found["fused"]["calls"] == calls and found["einsum"]["calls"] == []
    assert found["fused"]["scores"] == [] and found["einsum"]["scores"] != []
    assert found["fused"]["collectives"] == found["einsum"]["collectives"] == 0
