import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.data.spec import example_batch
from jax_instructblip.models import flops
from jax_instructblip.models.blip2 import Blip2
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from jax_instructblip.training import profiling
from jax_instructblip.training.metrics import Window
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.pair_objective import PairObjective
from jax_instructblip.training.state import partition
from tests.helpers.tiny import tiny_variant


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("cpu", 0.0),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_kind(kind, peak):
    assert profiling.peak_flops(0.0, kind) == peak
    assert profiling.peak_flops(7e12, kind) == 7e12


def objective(variant, dtype=jnp.float32):
    return LanguageObjective(VisionLanguageModel(variant, dtype))


@pytest.mark.parametrize(
    ("name", "parts", "side"),
    [
        ("instructblip-flan-t5-xl", ("qformer",), 224),
        ("instructblip-vicuna-13b", ("qformer",), 224),
        ("blip2-opt-6.7b", ("qformer",), 224),
        ("blip2-opt-2.7b", ("vision", "qformer"), 364),
        ("blip2-flan-t5-xl-vit-l", ("vision", "qformer"), 224),
    ],
)
def test_the_products_of_a_full_size_step_are_the_analytic_ones(name, parts, side):
    variant, rows, text = get_variant(name).replace(**{"vision.image_size": side}), 2, 16
    batch = example_batch(variant, batch=rows, text=text, answer=text)
    trainable, frozen = partition(param_shapes(variant), parts)
    use = profiling.Utilisation(objective(variant, jnp.bfloat16), 1e12)
    done = use.of_step(trainable, frozen, batch)
    trains = "vision" in parts
    expected = flops.analytic(variant, rows, *[text] * 3, trains_vision=trains)
    assert done == pytest.approx(expected, rel=0.01)
    # In two seconds, on as many devices as there are.
    found = use.metrics(done, 2.0)
    share = done / 2 / (1e12 * jax.device_count())
    assert found["model_flops_utilisation"] == pytest.approx(share)
    assert found["model_tflops_per_second"] == pytest.approx(done / 2e12)


@pytest.mark.parametrize("parts", [("qformer", "heads"), ("vision", "qformer", "heads")])
def test_the_products_of_a_full_size_first_stage(parts):
    """The match makes keys and values of an image three times, which the floor counts once.

    Their gradient also goes to the trained image norm, which the floor leaves out.
    """
    variant, pairs, text = get_variant("blip2-stage1"), 8, 32
    batch = example_batch(variant, batch=pairs, text=text)
    trainable, frozen = partition(param_shapes(variant), parts)
    model = Blip2(variant, jnp.bfloat16)
    done = profiling.Utilisation(PairObjective(model), 1e12).of_step(trainable, frozen, batch)
    vision, q = variant.vision, variant.qformer
    keys_values = q.layers // 2 * 2 * flops.linear(pairs * vision.tokens, q.vision_width, q.width)
    trains = "vision" in parts
    floor = flops.pairs(variant, pairs, text, trains_vision=trains)
    assert done == pytest.approx(floor + (9 if trains else 10) * keys_values, rel=0.003)


def test_nothing_is_counted_against_an_unknown_peak():
    use = profiling.Utilisation(objective(tiny_variant("t5")), 0.0)
    assert use.of_step({}, {}, {}) == 0 and use.metrics(0, 1.0) == {}
    assert profiling.Utilisation(objective(tiny_variant("t5")), 1e12).metrics(0, 1.0) == {}


def test_rates_are_of_all_steps_since_the_last_line():
    use = profiling.Utilisation(objective(tiny_variant("t5")), 1e9)
    window = Window(24, use)
    counts = {"replaced": np.zeros(4), "truncated": np.zeros((4, 3)), "text": np.array([1, 2])}
    window.skip(-10.0)  # as if it had begun ten seconds ago
    for _ in range(2):
        window.add({"loss": 1.0, "tokens": 30.0}, counts, flops=10**9)
    values = window.close()
    expected = 2 / 10 / jax.device_count()
    assert values["model_flops_utilisation"] == pytest.approx(expected, rel=0.05)
    assert values["tokens_per_second"] == pytest.approx(6, rel=0.05)
    # Of the whole batch, however many processes hold the same four rows of it.
    assert values["samples_per_second"] == pytest.approx(4.8, rel=0.05)
    assert values["device_share"] == 1.0


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    stats = [{"bytes_in_use": 2e9, "peak_bytes_in_use": 5e9, "x": 1}, {"bytes_in_use": 3e9}]
    devices = lambda known: [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in known]
    monkeypatch.setattr(jax, "local_devices", lambda: devices(stats))
    assert profiling.memory() == {"memory_gb": 3.0}  # one does not tell its peak
    monkeypatch.setattr(jax, "local_devices", lambda: devices([None, stats[0]]))
    assert profiling.memory() == {"memory_gb": 2.0, "memory_peak_gb": 5.0}
    monkeypatch.setattr(jax, "local_devices", lambda: devices([None]))
    assert profiling.memory() == {}


def test_a_trace_of_some_steps_after_the_first_ones(tmp_path):
    trace = profiling.Trace(tmp_path / "profile", first=10, steps=2)
    step, state, said = jax.jit(lambda x: x @ x), jnp.ones((8, 8)), []
    for number in range(11, 20):
        said.append(trace.before(number, state))
        state = step(state)
    assert [number for number, words in enumerate(said, 11) if words] == [16]
    assert said[5] == f"trace of steps 14 to 15: tensorboard --logdir {tmp_path / 'profile'}"
    assert trace.close() == ""
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_trace_that_a_run_ends_within_is_written(tmp_path):
    trace = profiling.Trace(tmp_path, first=0, steps=9)
    assert not trace.before(4, None)
    assert trace.close().startswith("trace of steps 4 to 4:")
    assert list(tmp_path.rglob("*.xplane.pb")) and trace.close() == ""


def test_a_run_too_short_for_a_trace_says_so(tmp_path):
    trace = profiling.Trace(tmp_path, first=4, steps=5)
    assert not any(trace.before(number, None) for number in (5, 6))
    assert trace.close().startswith("no trace: the run ended with step 6, a trace begins with step")
    assert trace.close() == "" and not list(tmp_path.iterdir())


def test_no_trace_unless_asked_for(tmp_path):
    trace = profiling.Trace(tmp_path / "profile", first=0, steps=0)
    assert not any(trace.before(number, None) for number in range(9)) and not trace.close()
    assert not (tmp_path / "profile").exists()
