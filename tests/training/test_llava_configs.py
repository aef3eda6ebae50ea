"""The configs of LLaVA: the papers' numbers, steps of epochs, pixels and questions of a sample."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import common
from jax_instructblip import stores
from jax_instructblip.data import templates
from jax_instructblip.data.images import PADDING
from jax_instructblip.inference.loading import read_source
from jax_instructblip.models.released import get_variant
from jax_instructblip.planning import plan
from jax_instructblip.planning.job import read_job
from jax_instructblip.training import setup
from jax_instructblip.training.config_fields import check_config
from jax_instructblip.training.config_file import change_fields, load_config
from jax_instructblip.training.initial import load_initial
from tests.helpers.tars import write_shards
from tests.helpers.tiny import QUESTION, write_base

LLM = ("projector", "llm")
# epochs, batch, rate, trained parts, template, crop, order of images: of papers and scripts.
RECIPES = {
    "llava_pretrain": (1, 128, 2e-3, ("projector",), "plain", "clip", "written"),
    "llava_finetune": (3, 32, 2e-5, LLM, "v1", "clip", "drawn"),
    "llava_scienceqa": (12, 128, 2e-5, LLM, "v1", "clip", "written"),
    "llava_1_5_pretrain": (1, 256, 1e-3, ("projector",), "plain", "clip", "written"),
    "llava_1_5_finetune": (1, 128, 2e-5, LLM, "v1", "pad", "first"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_papers_numbers(name):
    config = load_config(f"configs/{name}.py")
    check_config(config)
    data, chat, rates = config.data, config.chat, config.optimizer
    assert RECIPES[name] == (
        *(config.train.epochs, data.batch_size, rates.learning_rate, config.model.trainable),
        *(chat.template, data.crop, chat.image_order),
    )
    assert (rates.weight_decay, rates.clip_norm, rates.warmup_ratio) == (0.0, 1.0, 0.03)
    assert (rates.b1, rates.b2, rates.eps) == (0.9, 0.999, 1e-8)
    assert (rates.warmup_learning_rate, rates.final_learning_rate) == (0.0, 0.0)
    limit = {"llava_pretrain": 512, "llava_1_5_pretrain": 768}.get(name, 2_048)  # captions: less
    assert (chat.limit, data.augment, config.model.remat.llm) == (limit, False, "full")
    whole = "llm" in config.model.trainable
    assert (config.mesh.data, config.mesh.fsdp) == ((1, -1) if whole else (-1, 1))


@pytest.mark.parametrize("name", ["shapes_llava_pretrain", "shapes_llava"])
def test_the_drawn_worlds_configs_can_be_used(name):
    config = load_config(f"configs/{name}.py")
    check_config(config, run=True)
    assert "projector" in config.model.trainable


def test_a_crop_of_random_crops_is_refused():
    with pytest.raises(ValueError, match="data.crop is 'pad', config.data.augment is True"):
        check_config(change_fields(common.get_config(), {"data.crop": "pad"}))


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv(stores.VARIABLE, str(tmp_path / "copies"))


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A list of conversations, images in a folder of their own, and a base of LLaVA."""
    folder = tmp_path_factory.mktemp("talks")
    (folder / "images").mkdir()
    Image.new("RGB", (60, 30), (250, 0, 0)).save(folder / "images" / "wide.png")
    said = [("human", f"<image>\n{QUESTION}"), ("gpt", "red")]
    turns = [{"from": speaker, "value": value} for speaker, value in said]
    row = {"id": "a", "image": "wide.png", "conversations": turns}
    (folder / "talks.json").write_text(json.dumps([row]))
    return folder, write_base(folder / "base", "llava")


def batches(folder, base, source, **fields):
    config = common.get_config()
    with config.unlocked():
        config.data.sources = {"talks": source}
    plain = {"data.batch_size": 1, "data.augment": False, "train.steps": 1, "chat.template": "v1"}
    config = change_fields(config, plain | fields)
    initial = load_initial(base, trainable=("projector",))
    return setup.read_batches(config, setup.read_mixture(config), initial, np.arange(1))


def test_images_of_conversations_lie_in_another_folder(talks):
    folder, base = talks
    source = common.source(str(folder / "talks.json"), images=str(folder / "images"))
    corners = {}
    for crop in ("squash", "clip", "pad"):
        batch = batches(folder, base, source, **{"data.crop": crop})[0]
        corners[crop] = tuple(batch["images"][0, 0, 0, 0])
    assert corners == {"squash": (250, 0, 0), "clip": (250, 0, 0), "pad": PADDING}
    assert PADDING == (122, 116, 104)
    with pytest.raises(ValueError, match="image 'wide.png' does not exist"):
        batches(folder, base, common.source(str(folder / "talks.json")))
    with pytest.raises(ValueError, match="images is .*only a JSON list of conversations"):
        batches(folder, base, common.source("shapes", images=str(folder)))


def test_a_brief_question_is_drawn_for_each_caption(talks):
    """The choice depends on seed and sample alone."""
    folder, base = talks
    source = common.source(str(write_shards(folder / "tars", (9,))), templates="brief")
    made = batches(folder, base, source)
    asked = [made._text(sample)[2]["tokens"] for sample in range(12)]
    texts = [made.text.llm.decode(tokens) for tokens in asked]
    found = [next(t for t in templates.BRIEF if _letters(t) in _letters(text)) for text in texts]
    assert len(set(found)) > 4
    plain = batches(folder, base, source, **{"chat.template": "v1", "chat.system": ""})
    assert len(plain._text(0)[2]["tokens"]) < len(asked[0]) - 50  # no system message
    again = batches(folder, base, source)
    for sample, tokens in enumerate(asked):
        np.testing.assert_array_equal(again._text(sample)[2]["tokens"], tokens)


def _letters(text):
    return "".join(text.split())


@pytest.mark.parametrize(
    ("name", "model", "lengths"),
    [("llava_finetune", "llava-7b", 1_792), ("llava_1_5_finetune", "llava-1.5-13b", 1_472)],
)
def test_the_language_model_and_its_moments_are_split_over_all_devices(name, model, lengths):
    config = load_config(f"configs/{name}.py")
    job = read_job(config, get_variant(model))
    assert job.lengths["targets"] == job.lengths["tokens"] == lengths
    assert job.scans.llm.remat == "full" and job.floor() > 1e15
    state, frozen, _, _ = plan.job_arguments(job, setup.make_mesh(1, 1, 1, jax.devices()[:1]))
    assert sorted(state.params) == ["llm", "projector"] and list(frozen) == ["vision"]
    floats = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.optimizer[0].mu))}
    assert floats == {np.dtype("float32")}


def test_an_instruction_of_the_qformer_is_no_field_of_llava(talks):
    _, base = talks
    assert read_source(base).variant.kind == "llava"
    with pytest.raises(ValueError, match="unknown model field 'qformer.instruction_aware'"):
        load_initial(base, fields={"qformer.instruction_aware": False})
