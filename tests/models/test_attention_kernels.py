"""Attention by kernels: what they are given, where they are called, and their programs."""

import functools
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from configs import common
from jax_instructblip.models import attention_kernels
from jax_instructblip.models.attention import attend
from jax_instructblip.models.attention_kernels import CausalRows, block_size, kernel_for, takes
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.masks import causal_mask
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning.topology import has_cuda
from jax_instructblip.training.setup import read_scans
from tests.helpers.interpreter import run_module, run_python
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


def gradients(fused, masked, scale, *factors, segments=SEGMENTS):
    """Values of attention, and gradients of a weighted sum of them, in float32."""
    mask = CausalRows(causal_mask(segments), segments) if masked else None
    take = functools.partial(attend, mask=mask, scale=scale, fused=fused)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(factors[0].shape))
    loss = lambda *factors: (take(*factors).astype(jnp.float32) * weights).sum()
    out = take(*factors), *jax.grad(loss, (0, 1, 2))(*factors)
    return [np.asarray(leaf.astype(jnp.float32)) for leaf in out]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(("masked", "scale"), [(True, None), (False, 1.0)])
def test_cudnn_is_asked_for_what_the_einsums_compute(calls, key_heads, masked, scale):
    factors = inputs(key_heads)
    found = gradients("cudnn", masked, scale, *factors)
    assert calls == [(2, 8, 4, 16)] * 2
    for each, other in zip(found, gradients("", masked, scale, *factors), strict=True):
        assert error(each, other) < 0.02  # roundings to 8 bits


def test_what_cudnn_cannot_take_stays_with_the_einsums():
    query, key, _ = inputs()
    mask, ones = causal_mask(SEGMENTS), jnp.ones((1, 4, 8, 8))
    fits = functools.partial(takes, "cudnn")
    assert fits(query, key, mask, None, None) and fits(query, key, None, None, None)
    assert fits(query.astype(jnp.float16), key, None, None, None)
    assert not fits(query.astype(jnp.float32), key, None, None, None)
    assert not fits(query, key, mask, ones, None)  # T5's bias is learned
    assert not fits(query, key, mask, None, lambda weights: weights)
    assert fits(query[:, :7], key, None, None, None)
    assert not fits(query[:, :7], key, mask[:, :, :7], None, None)
    assert not fits(query, key[:, :7], mask[..., :7], None, None)
    assert not fits(query[..., :12], key, None, None, None)
    wide = jnp.zeros((1, 2, 1, 136), jnp.bfloat16)
    assert not fits(wide, wide, None, None, None)


def causal(slots, width=128, heads=2, dtype=jnp.bfloat16):
    """A query, the causal rows of its samples, and another query."""
    rng = np.random.default_rng(slots)
    segments = np.sort(rng.integers(1, 4, (2, slots)), axis=1)
    segments[1, -slots // 4 :] = 0  # padding
    query = jnp.asarray(rng.standard_normal((2, slots, heads, width)), dtype)
    return query, CausalRows(causal_mask(jnp.asarray(segments)), jnp.asarray(segments))


def test_what_splash_attention_cannot_take_stays_with_the_einsums():
    fits = functools.partial(takes, "splash")
    query, rows = causal(256)
    assert fits(query, query, rows, None, None)
    assert not fits(query, query, rows.mask, None, None)
    assert not fits(query, query, None, None, None)
    assert not fits(query, query, rows, jnp.ones((1, 2, 256, 256)), None)
    assert not fits(query, query, rows, None, lambda weights: weights)
    for slots, width, dtype in (
        (192, 128, jnp.bfloat16),
        (256, 80, jnp.bfloat16),
        (256, 384, jnp.bfloat16),  # too wide for a core's memory
        (256, 128, jnp.float16),  # which the compiler for TPUs does not load
        (256, 128, jnp.float32),
    ):
        other, rows = causal(slots, width=width, dtype=dtype)
        assert not fits(other, other, rows, None, None)


@pytest.mark.parametrize(
    ("axes", "rows", "fit"),
    [
        (("data", "fsdp", "tensor"), 4, True),
        (("data", "fsdp", "tensor"), 3, False),
        (("batch", "fsdp", "tensor"), 4, False),
    ],
)
def test_splash_attention_needs_our_mesh_and_rows_for_each_of_its_parts(
    monkeypatch, axes, rows, fit
):
    mesh = jax.sharding.AbstractMesh((2, 2, 2), axes)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    query = jnp.zeros((rows, 128, 2, 128), jnp.bfloat16)
    segments = jnp.ones((rows, 128), jnp.int32)
    mask = CausalRows(causal_mask(segments), segments)
    assert takes("splash", query, query, mask, None, None) == fit


@pytest.mark.parametrize("slots", [128, 640, 1408, 2048])
def test_blocks_divide_a_row(slots):
    assert slots % block_size(slots) == 0
    assert block_size(slots) == {128: 128, 640: 640, 1408: 128, 2048: 1024}[slots]


@pytest.fixture
def interpreted(monkeypatch):
    """Splash attention computed by JAX's interpreter, and the shapes of its calls' queries."""
    make, found = splash_attention_kernel.make_splash_mqa_single_device, []

    def interpret(*given, **options):
        attend = make(*given, **options, interpret=True)

        def call(query, *rest, **more):
            found.append(query.shape)
            return attend(query, *rest, **more)

        return call

    monkeypatch.setattr(splash_attention_kernel, "make_splash_mqa_single_device", interpret)
    return found


@pytest.mark.parametrize(("key_heads", "scale"), [(2, None), (1, 1.0)])
def test_splash_attention_gives_what_the_einsums_give(interpreted, monkeypatch, key_heads, scale):
    monkeypatch.setattr(attention_kernels, "BLOCK", 128)  # so that a row has two
    query, rows = causal(256)
    rng = np.random.default_rng(1)
    draw = lambda: jnp.asarray(0.3 * rng.standard_normal((2, 256, key_heads, 128)), query.dtype)
    factors, real = (query, draw(), draw()), np.asarray(rows.segments > 0)
    give = lambda fused: gradients(fused, True, scale, *factors, segments=rows.segments)
    expected = give("")
    assert not interpreted
    found = give("splash")
    assert interpreted == [(2 // key_heads, 256, 128)] * 2
    # What padding sees differs from nothing to nothing; its gradient reaches no sample.
    assert error(found[0][real], expected[0][real]) < 0.02
    for each, other in zip(found[1:], expected[1:], strict=True):
        assert error(each[real], other[real]) < 0.02  # roundings to 8 bits


def test_splash_attention_on_a_mesh_is_that_of_one_device():
    """Heads, rows and weights are split; key heads that cannot be divided are on all devices."""
    run_python(
        """
        import functools
        import jax, numpy as np
        from jax.experimental.pallas.ops.tpu import splash_attention
        from jax_instructblip.models.attention import attend
        from jax_instructblip.parallel.mesh import make_mesh
        from tests.models.test_attention_kernels import causal

        kernels = splash_attention.splash_attention_kernel
        make = kernels.make_splash_mqa_single_device
        kernels.make_splash_mqa_single_device = functools.partial(make, interpret=True)
        query, rows = causal(128)
        for key_heads in (2, 1):
            key = query[:, ::-1, :key_heads]
            run = jax.jit(lambda q, k, rows: attend(q, k, k, rows, fused="splash"))
            alone = run(query, key, rows)
            with jax.set_mesh(make_mesh(1, 2, 2, jax.devices()[:4])):
                found = run(query, key, rows)
            np.testing.assert_array_equal(np.asarray(found), np.asarray(alone))
        """,
        devices=4,
    )


@pytest.mark.parametrize(
    ("kind", "dropout", "rows"),
    [("llama", 0.0, True), ("llama", 0.1, False), ("opt", 0.1, True), ("t5", 0.0, False)],
)
def test_vision_and_decoder_only_models_call_it(calls, kind, dropout, rows):
    sizes = {"vision.width": 32, "qformer.vision_width": 32, "llm.dropout": dropout}
    variant = divisible(kind, **sizes)
    scan = Scan(fused="cudnn")
    model = VisionLanguageModel(variant, jnp.bfloat16, Scans(scan, scan, scan))
    batch = jax.tree.map(jnp.asarray, make_batch(variant, 2, text=10))
    assert batch["tokens"].shape[1] % 2 == 0
    rng = jax.random.key(0)
    apply = lambda params: model.apply({"params": params}, batch, train=True, rngs={"dropout": rng})
    jax.eval_shape(apply, param_shapes(variant))
    images = (2, variant.vision.tokens, 4, 8)
    assert set(calls) == {images, *([(*batch["tokens"].shape, 4, 8)] if rows else [])}


def test_gpus_since_a100_and_tpus_have_a_kernel():
    device = lambda platform, **fields: types.SimpleNamespace(platform=platform, **fields)
    for capability in ("8.0", "9.0", "10.0"):
        assert kernel_for(device("gpu", compute_capability=capability)) == "cudnn"
    assert kernel_for(device("tpu")) == "splash"
    old = device("gpu", compute_capability="7.5")
    assert kernel_for(jax.devices("cpu")[0]) == kernel_for(device("gpu")) == kernel_for(old) == ""


def test_towers_that_ask_for_a_kernel_get_that_of_their_devices():
    scans = lambda kernel: Scans(Scan(fused=kernel), Scan("dots"), Scan("full", fused=kernel))
    for kernel in ("splash", "cudnn", ""):
        assert scans("auto").on(kernel) == scans(kernel)


def test_runs_ask_for_it_on_their_own_devices_alone():
    config = common.get_config()
    kernels = lambda mesh: {scan.fused for scan in vars(read_scans(config, mesh)).values()}
    assert kernels(None) == {""}
    config.model.attention = "auto"
    assert kernels(None) == {"auto"}  # for a plan
    assert kernels(make_mesh()) == {""}


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("masked", "key_heads"), [(True, 4), (False, 4), (True, 2)])
def test_cudnn_gives_what_the_einsums_give(masked, key_heads):
    factors = inputs(key_heads)
    found = gradients("cudnn", masked, None, *factors)
    for each, other in zip(found, gradients("", masked, None, *factors), strict=True):
        assert error(each, other) < 0.02  # roundings to 8 bits


@pytest.mark.full
@pytest.mark.skipif(not has_cuda(), reason="needs the CUDA compiler: pip install -e .[gpu]")
def test_programs_for_gpus_hold_no_scores_and_need_no_collectives():
    found = programs("h200:8")
    product = 2 * 8 * 32 * 32 * 4 * 16  # of 8 rows of 32 slots with 4 heads of 16
    assert found["fused"]["flops"] == (2 + 5) * product  # scores are computed again
    assert found["einsum"]["flops"] == (2 + 4) * product
    calls = ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]
    assert found["fused"]["calls"] == calls and found["einsum"]["calls"] == []
    assert found["fused"]["scores"] == [] and found["einsum"]["scores"] != []
    assert found["fused"]["collectives"] == found["einsum"]["collectives"] == 0


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[tpu]"
)
def test_programs_for_tpus_hold_no_scores_and_need_no_collectives():
    found = programs("v5e:2x4")
    assert found["fused"]["calls"] == ["tpu_custom_call"] and found["einsum"]["calls"] == []
    assert found["fused"]["scores"] == [] and found["einsum"]["scores"] != []
    assert found["fused"]["collectives"] == found["einsum"]["collectives"] == 0


def programs(topology):
    printed = run_module("tests.helpers.attention_programs", topology, devices=8)
    return json.loads(printed.splitlines()[-1])
