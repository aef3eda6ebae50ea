"""The configs of the fine-tunings: the papers' numbers, and programs that can be built of them."""

import jax
import pytest

from jax_instructblip.data import templates
from jax_instructblip.planning import plan
from jax_instructblip.planning.job import read_job, read_variant
from jax_instructblip.training import setup
from jax_instructblip.training.config_fields import check_config
from jax_instructblip.training.config_file import load_config
from jax_instructblip.training.run_length import make_optimizer

# epochs, warm-up, rate, batch, b2, weight decay, pixels, rate by layers: of the paper's tables.
BLIP2 = {
    "caption_flan_t5_xl": (5, 1_000, 1e-5, 256, 0.999, 0.05, 364, 1.0),
    "caption_opt_2_7b": (5, 1_000, 1e-5, 256, 0.999, 0.05, 364, 1.0),
    "caption_opt_6_7b": (5, 1_000, 1e-5, 256, 0.999, 0.05, 364, 0.95),
    "vqa_flan_t5_xl": (5, 1_000, 1e-5, 128, 0.999, 0.05, 490, 0.95),
    "vqa_opt_2_7b": (5, 1_000, 1e-5, 128, 0.999, 0.05, 490, 0.95),
    "vqa_opt_6_7b": (5, 1_000, 1e-5, 128, 0.999, 0.05, 490, 0.9),
    "retrieval_vit_g": (5, 1_000, 1e-5, 224, 0.999, 0.05, 364, 0.95),
    "retrieval_vit_l": (5, 1_000, 5e-6, 224, 0.98, 0.05, 364, 1.0),
}
KINDS = {"caption": "blip2", "vqa": "instructblip", "retrieval": "blip2_stage1"}


@pytest.mark.parametrize("name", BLIP2)
def test_blip2s_numbers(name):
    config = load_config(f"configs/blip2_{name}.py")
    check_config(config)
    rates = config.optimizer
    found = (
        *(config.train.steps / rates.epoch_steps, rates.warmup_steps, rates.learning_rate),
        *(config.data.batch_size, rates.b2, rates.weight_decay, config.model.image_size),
        rates.vision_layer_decay,
    )
    assert found == BLIP2[name]
    assert "vision" in config.model.trainable and "llm" not in config.model.trainable
    task = name.partition("_")[0]
    known, variant = read_variant(config)
    assert variant.kind == KINDS[task]
    assert variant.reads_instruction == (task == "vqa")
    assert ("vit-l" in known) == ("vit_l" in name)
    for source in config.data.sources.values():
        group = templates.TEMPLATES.get(source.templates, ())
        assert (config.validation.prompt in group) == (task != "retrieval")
    assert config.train.pairs_by_image == (task == "retrieval")
    _, schedule = make_optimizer(config)
    epoch = rates.epoch_steps
    assert schedule(2 * epoch) == schedule(3 * epoch - 1) > schedule(3 * epoch)


@pytest.mark.parametrize("name", ["okvqa", "aokvqa", "ocrvqa", "scienceqa"])
def test_instructblips_tunings_leave_the_image_encoder_frozen(name):
    config = load_config(f"configs/tuning_{name}.py")
    check_config(config)
    assert tuple(config.model.trainable) == ("qformer",) and config.model.image_size == 0
    assert list(config.data.sources) == [name]
    assert 0 < config.optimizer.warmup_steps <= config.train.steps / 10
    assert config.validation.every <= config.train.steps


@pytest.mark.parametrize(("name", "tokens"), [("caption_opt_2_7b", 677), ("vqa_flan_t5_xl", 1226)])
def test_plans_are_of_larger_images_and_a_trained_tower(name, tokens):
    config = load_config(f"configs/blip2_{name}.py")
    job = read_job(config, read_variant(config)[1])
    assert job.variant.vision.tokens == tokens and job.scans.vision.remat == "full"
    mesh = setup.make_mesh(1, 1, 1, jax.devices()[:1])
    state, frozen, batch, _ = plan.job_arguments(job, mesh)
    assert sorted(state.params) == ["qformer", "vision"] and list(frozen) == ["llm"]
    assert state.params["vision"]["pos_embed"].shape == (1, tokens, 1408)
    size = config.model.image_size
    assert batch["images"].shape[-3:] == (size, size, 3)
