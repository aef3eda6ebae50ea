import dataclasses
from pathlib import Path

import jax
import pytest

from configs import blip2_stage1, common, paper_vicuna_7b
from jax_instructblip.data.packing import round_up
from jax_instructblip.models import flops
from jax_instructblip.models.released import VARIANTS, get_variant
from jax_instructblip.models.vlm import param_shapes
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning import advice, plan, sweep
from jax_instructblip.planning.chips import CHIPS, DEFAULT_SHARE
from jax_instructblip.planning.job import check_rows, fit_rows, read_job, read_variant
from jax_instructblip.planning.topology import Topology
from tests.helpers.planned import job_of
from tests.helpers.tiny import tiny_variant

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("instructblip")])
def test_names_of_released_models(name):
    config = common.get_config()
    short = name.removeprefix("instructblip-")
    for given in (name, short, f"base/{short.replace('-', '_')}"):
        config.model.checkpoint = given
        assert read_variant(config) == (name, VARIANTS[name])


def test_a_config_without_a_checkpoint_is_named_by_its_folder():
    assert read_variant(paper_vicuna_7b.get_config())[0] == "instructblip-vicuna-7b"


def test_a_model_of_no_known_name():
    config = common.get_config()
    config.model.checkpoint = "gpt"
    with pytest.raises(ValueError, match="'gpt', no folder and no name.*instructblip-vicuna-7b"):
        read_variant(config)


def test_a_batch_that_does_not_divide():
    job = dataclasses.replace(job_of(tiny_variant("llama")), batch=9, accumulate=2)
    with pytest.raises(ValueError, match="batch of 9 .* in 2 parts .* multiple of 2"):
        check_rows(job, make_mesh(1, 1, 1, jax.devices()[:1]))


def test_a_plan_is_of_the_program_that_train_runs():
    config = common.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(
            {"data.batch_size": 16, "data.samples_per_row": 8, "train.non_finite": "skip"}
        )
    job = read_job(config, tiny_variant("llama"))
    assert job.skip_non_finite
    _, _, batch, _ = plan.job_arguments(job, make_mesh(1, 1, 1, jax.devices()[:1]))
    widths = {name: batch[name].shape[1] for name in ("slots", "targets")}
    row = {
        "slots": 8 * (job.variant.visual_tokens + job.lengths["tokens"]),
        "targets": 8 * job.lengths["targets"],
    }
    assert widths == {name: round_up(length) for name, length in row.items()}
    # Rows as they are known to be, of fewer samples where a device has fewer.
    config.plan.row_slots, config.plan.row_targets = 1000, 130
    known, mesh = read_job(config, tiny_variant("llama")), make_mesh(1, 1, 1, jax.devices()[:1])
    batch = plan.job_arguments(known, mesh)[2]
    assert (batch["slots"].shape[1], batch["targets"].shape[1]) == (1024, 192)
    fewer = fit_rows(dataclasses.replace(known, accumulate=4), mesh)
    assert (fewer.samples_per_row, fewer.row["row_slots"]) == (4, 500)
    # Those of one sample are all padded to the limits, which is more work.
    alone = fit_rows(dataclasses.replace(known, accumulate=16), mesh)
    assert alone.samples_per_row == 1 and alone.floor() > fewer.floor()
    # And of use is what samples of the mean length need.
    assert known.useful() == 0
    config.plan.sample = (1, 10, 16, 4)
    useful, visual = read_job(config, known.variant).useful(), known.variant.visual_tokens
    assert 0 < useful == 16 * flops.analytic(known.variant, 1, 10, 16 - visual, 4)
    # Frozen kernels as a run holds them.
    config.model.frozen_dtype = "int8"
    job = read_job(config, tiny_variant("llama"))
    state, frozen, *_ = plan.job_arguments(job, mesh)
    kernel = frozen["llm"]["layers"]["mlp"]["gate"]["kernel"]
    assert (kernel["q"].dtype, kernel["scale"].shape) == ("int8", (2, 1, job.variant.llm.mlp))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    config.model.frozen_dtype = "bfloat16"
    config.chat.template, config.chat.limit = "v1", 99
    lengths = read_job(config, tiny_variant("llama")).lengths
    assert lengths["tokens"] + job.variant.visual_tokens == 99
    config.parallel.mode = "pmap"
    with pytest.raises(ValueError, match="parallel.mode is pmap: plans are of .* jit compiles"):
        read_job(config, tiny_variant("llama"))


def test_a_first_stage_is_planned(monkeypatch):
    config = blip2_stage1.get_config()
    name, variant = read_variant(config)
    assert (name, variant) == ("blip2-stage1", VARIANTS["blip2-stage1"])
    job = read_job(config, variant)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    state, _, batch, _ = plan.job_arguments(job, mesh)
    assert {each.shape[0] for each in batch.values()} == {1_680}
    assert batch["captions"].shape == (1_680, 32) and "tokens" not in batch
    assert set(state.params) == {"qformer", "heads"}
    # What is proposed is what the first stage can do: no parts of a batch, no language model.
    topology = Topology("none", jax.devices()[:1], None)
    proposed = [what for what, *_ in advice._changes(job, mesh, topology)]
    assert proposed == [f"--config.model.remat.qformer={remat}" for remat in ("dots", "full")]
    with pytest.raises(ValueError, match="no language model: its step is train, found decode"):
        read_job(config, variant, "decode")
    with monkeypatch.context() as patch:
        patch.setattr(advice, "feasible_meshes", lambda job, chips: [])
        with pytest.raises(
            ValueError, match=r"another batch, or --config\.model\.remat\.qformer=f"
        ):
            sweep.sweep(config, [], "cpu:1")
    config.data.samples_per_row = 2
    with pytest.raises(ValueError, match="samples_per_row is 2: in the first stage each pair"):
        read_job(config, variant)
    config.data.samples_per_row, config.model.image_size = 1, 225
    with pytest.raises(ValueError, match=r"config\.model: .*image_size 225 is no multiple"):
        read_job(config, variant)


@pytest.mark.parametrize(
    ("text", "need"),
    [
        ("Ran out of memory in memory space hbm. Used 17.20G of 15.75G hbm. Exceeded", 17.2),
        ("memory required for HLO temporaries (16.17G) exceeds available HBM (15.75G).", 16.17),
    ],
)
def test_refusals_of_the_compiler_are_read(text, need):
    line, found = plan._refusal(RuntimeError(f"first\n{text}\nlast"))
    assert line == text and found == int(need * 2**30)


def test_other_errors_of_the_compiler_are_raised():
    with pytest.raises(RuntimeError, match="something else"):
        plan._refusal(RuntimeError("something else"))


@pytest.fixture(scope="module")
def refused():
    """A job of 16 rows, residuals of half a chip, which the compiler refused."""
    job = job_of(tiny_variant("llama"))
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    arguments = plan.job_arguments(job, mesh)
    with jax.set_mesh(mesh):
        jaxpr = plan.job_function(job, mesh, arguments).trace(*arguments).jaxpr.jaxpr
    held, kept = plan.bytes_per_device(arguments), plan.residuals(jaxpr)
    report = plan.Report(held, 0, 0, 0, kept, held + kept, "Used ...", None, 1, {})
    return job, mesh, report


def _chip(memory: float) -> Topology:
    chip = dataclasses.replace(CHIPS["v5e"], memory=memory)
    return Topology("v5e:1x1", jax.devices()[:1], chip)


def test_the_smallest_change_that_would_do(refused):
    job, mesh, report = refused
    change = lambda share: advice.smallest_change(
        job, mesh, _chip(report.arguments + share * report.residuals), report
    )
    first = change(0.95)
    assert first.what == "--config.model.remat.llm=dots" and first.need < report.need
    second = change(0.45)
    assert second.what == f"{first.what} --config.model.remat.qformer=dots"
    third = change(0.25)
    assert third.what == f"--config.train.accumulate=2 {second.what}"
    assert third.need < second.need < first.need
    assert change(0.0) is None


def test_a_trained_vision_tower_is_computed_again_first():
    """Frozen it has no backward pass, and nothing is proposed for it."""
    job, mesh = job_of(tiny_variant("llama")), make_mesh(1, 1, 1, jax.devices()[:1])
    changes = lambda job: [what for what, _, _ in advice._changes(job, mesh, _chip(1e9))]
    assert not any("remat.vision" in what for what in changes(job))
    trained = changes(dataclasses.replace(job, trainable=("vision", "qformer")))
    assert trained[1] == "--config.model.remat.llm=dots --config.model.remat.vision=dots"
    assert "--config.model.remat.vision=full" in trained


def test_a_sweep_begins_with_what_may_fit(refused):
    job, _, report = refused
    feasible = lambda share: advice.feasible_meshes(
        job, _chip(report.arguments + share * report.residuals)
    )
    assert feasible(0.9) == [] and feasible(1.1) == [(1, 1, 1)]
    assert advice.meshes(job, _chip(report.arguments * 1.1)) == [(1, 1, 1)]


def test_verdicts(refused):
    job, mesh, report = refused
    fits, sentence = advice.verdict(job, mesh, _chip(report.arguments * 0.5), report)
    assert not fits and "alone" in sentence and "more chips" in sentence
    report = dataclasses.replace(report, refusal="")
    fits, sentence = advice.verdict(job, mesh, _chip(report.need * 2), report)
    assert fits and sentence.startswith("fits")


def test_a_gpu_may_give_a_program_more_of_its_memory(refused):
    """JAX takes three quarters by default: the least change is to let it have more."""
    job, mesh, report = refused
    report = dataclasses.replace(report, refusal="")

    def gpu(total):
        card = dataclasses.replace(CHIPS["h200"].gpu, total=total)
        chip = dataclasses.replace(CHIPS["h200"], memory=total * DEFAULT_SHARE, gpu=card)
        return Topology("h200:1", jax.devices()[:1], chip)

    assert advice.verdict(job, mesh, gpu(report.need * 1.4), report)[0]
    fits, sentence = advice.verdict(job, mesh, gpu(report.need * 1.1), report)
    assert not fits and "change: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the env" in sentence
    change = advice.smallest_change(job, mesh, _chip(report.need * 0.97), report)
    assert change.what == "--config.model.remat.llm=dots"
    both = advice.smallest_change(job, mesh, gpu(change.need / 0.85), report)
    assert (
        both.what == f"{change.what}, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment"
    )
    gpu = gpu(report.need)
    assert "cuBLAS" in advice.remarks(job, mesh, gpu)[-1]
    assert advice.remarks(job, mesh, _chip(1e9)) == []


def test_the_best_of_several():
    row = lambda **more: {
        "fits": True,
        "batch": 8,
        "bounds": {"compute": 1.0, "links": 0.5},
        "moved_bytes": 5,
        **more,
    }
    assert advice.best([row(fits=False)], 8) is None
    slow = row(bounds={"compute": 1.0, "links": 2.0}, moved_bytes=1)
    least = row(moved_bytes=4)
    assert advice.best([slow, row(), least, row(fits=False, batch=99)], 8) is least
    half = row(batch=4, bounds={"compute": 0.5, "links": 0.1}, moved_bytes=1)
    assert advice.best([half, least], 8) is least  # as fast, and what the config trains with
    assert advice.best([half, row(moved_bytes=1)], 16) == row(moved_bytes=1)  # least for a sample
    faster = row(batch=4, bounds={"compute": 0.4, "links": 0.1})
    assert advice.best([faster, least], 8) is faster


def test_the_best_where_no_speed_is_known():
    row = lambda batch, moved: {"fits": True, "batch": batch, "moved_bytes": moved}
    assert advice.best([row(8, 3), row(4, 2), row(16, 5)], 2) == row(16, 5)
    assert advice.best([row(8, 3), row(4, 2), row(16, 5)], 4) == row(4, 2)


def test_meshes_that_move_less_come_first():
    config = common.get_config()
    train, decode = (
        read_job(config, get_variant("instructblip-vicuna-7b"), step)
        for step in ("train", "decode")
    )
    traffic = lambda *sizes: advice.estimated_traffic(train, 128, sizes)
    assert 0 < traffic(16, 1, 1) < traffic(1, 16, 1) and traffic(1, 8, 2) < traffic(1, 16, 1)
    # A mesh of whole weights sums gradients alone, which answering has none of.
    qformer = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(train.variant)["qformer"]))
    assert traffic(16, 1, 1) == 2 * 4 * qformer * 15 / 16
    assert advice.estimated_traffic(decode, 128, (16, 1, 1)) == 0
