import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.data.batch import sample_sizes
from jax_instructblip.data.spec import example_batch
from jax_instructblip.models import flops
from jax_instructblip.models.blip2 import Blip2
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from jax_instructblip.training import profiling
from jax_instructblip.training.metrics import SIZES, Window
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.pair_objective import PairObjective
from jax_instructblip.training.state import partition
from tests.helpers import packing
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


def step_flops(objective, trainable, frozen, batch):
    """FLOPs of loss and gradient on the jaxpr, which nothing rematerialises."""
    shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    like = lambda tree: jax.tree.map(shape, tree)

    def loss(trainable, frozen, batch, rng):
        return objective({**frozen, **trainable}, batch, rng, objective.totals(batch))

    arguments = like(trainable), like(frozen), like(batch), jax.random.key(0)
    return flops.count(jax.make_jaxpr(jax.grad(loss, has_aux=True))(*arguments).jaxpr)


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
    objective = LanguageObjective(VisionLanguageModel(variant, jnp.bfloat16))
    trains = "vision" in parts
    expected = flops.analytic(variant, rows, *[text] * 3, trains_vision=trains)
    assert step_flops(objective, trainable, frozen, batch) == pytest.approx(expected, rel=0.01)
    # Nothing is padded here, so all of it is of use: in two seconds, on as many devices as there
    # are, of which this host makes half of the rows.
    use = profiling.Utilisation(variant, parts, 1e12)
    done = use.of_step(sample_sizes(batch), 2 * rows)
    assert done == 2 * expected
    found = use.metrics(done, 2.0)
    share = done / 2 / (1e12 * jax.device_count())
    assert found["model_flops_utilisation"] == pytest.approx(share)
    assert found["model_tflops_per_second"] == pytest.approx(done / 2e12)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_padding_and_row_mates_are_of_no_use(kind):
    """The useful FLOPs of a packed batch are those of each of its samples alone."""
    variant = packing.still(kind)
    batch = packing.rows(variant, packing.samples(variant, 8), 4)
    sizes = sample_sizes(batch)
    alone = sum(flops.useful(variant, sizes[n : n + 1], ("qformer",)) for n in range(8))
    assert flops.useful(variant, sizes, ("qformer",)) == pytest.approx(alone, rel=1e-6)
    text, answer = int(sizes[0, 1]), int(sizes[0, 3])
    one = np.array([[1, text, variant.visual_tokens + 20, answer]])
    assert flops.useful(variant, one, ("qformer",)) == flops.analytic(variant, 1, text, 20, answer)


@pytest.mark.parametrize("parts", [("qformer", "heads"), ("vision", "qformer", "heads")])
def test_the_products_of_a_full_size_first_stage(parts):
    """Contrast and match make keys and values of an image, the match those of a negative as well.

    The floor counts them once: a negative's would have to come from other devices. Their gradient
    also goes to the trained image norm, which the floor leaves out.
    """
    variant, pairs, text = get_variant("blip2-stage1"), 8, 32
    batch = example_batch(variant, batch=pairs, text=text)
    trainable, frozen = partition(param_shapes(variant), parts)
    done = step_flops(PairObjective(Blip2(variant, jnp.bfloat16)), trainable, frozen, batch)
    vision, q = variant.vision, variant.qformer
    keys_values = q.layers // 2 * 2 * flops.linear(pairs * vision.tokens, q.vision_width, q.width)
    trains = "vision" in parts
    floor = flops.pairs(variant, pairs, text, trains_vision=trains)
    assert done == pytest.approx(floor + (6 if trains else 7) * keys_values, rel=0.003)
    assert profiling.Utilisation(variant, parts, 1.0).of_step(sample_sizes(batch), pairs) == floor


def test_nothing_is_counted_against_an_unknown_peak():
    use = profiling.Utilisation(tiny_variant("t5"), ("qformer",), 0.0)
    assert use.of_step(np.ones((1, 4)), 1) == 0 and use.metrics(0, 1.0) == {}
    assert profiling.Utilisation(tiny_variant("t5"), ("qformer",), 1e12).metrics(0, 1.0) == {}


def test_rates_are_of_all_steps_since_the_last_line():
    variant, sizes = tiny_variant("t5"), np.array([[1, 4, 12, 3], [1, 2, 11, 6]] * 2)
    window = Window(24, profiling.Utilisation(variant, ("qformer",), 1e9))
    counts = {"replaced": np.zeros(4), "truncated": np.zeros((4, 3)), "text": np.array([1, 2])}
    counts |= {"sizes": sizes, "row": np.array([64, 32])}
    window.skip(-10.0)  # as if it had begun ten seconds ago
    for _ in range(2):
        window.add({"loss": 1.0, "tokens": 30.0}, counts)
    values = window.close()
    # 24 samples a step, of which this host has 4.
    done = 2 * 6 * flops.useful(variant, sizes, ("qformer",))
    expected = done / 10 / (1e9 * jax.device_count())
    assert values["model_flops_utilisation"] == pytest.approx(expected, rel=0.05)
    assert values["slots_per_second"] == pytest.approx(4.8 * 11.5, rel=0.05)
    means = {name: values[f"sample_{name}"] for name in SIZES}
    assert means == {"images": 1, "instruction": 3, "slots": 11.5, "targets": 4.5}
    assert (values["row_slots"], values["row_targets"]) == (64, 32)
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
