"""The data that a configuration may train on."""

import dataclasses
import json
import shutil
import types

import pytest

from configs import common
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.prepare import shards
from jax_instructblip.data.sources import open_records
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import read_source
from jax_instructblip.training import loop, patch_features
from jax_instructblip.training.setup import check_model, read_mixture, read_text, read_workdir
from tests.helpers.toy_data import COUNT, TOY, write_raw


@pytest.fixture
def prepared(tmp_path):
    """Writes a small dataset under a name of the table."""
    raw = write_raw(tmp_path / "raw")

    def write(name):
        toy = dataclasses.replace(TOY, name=name, files={"train": ()})
        shards.prepare(toy, raw, tmp_path / "data")
        return str(tmp_path / "data" / name)

    return write


def configure(path, **fields):
    config = common.get_config()
    with config.unlocked():
        config.data.sources.mine = common.source(path, templates="question")
    config.data.update(fields)
    return config


def test_a_prepared_folder_is_a_source(prepared):
    path = prepared("vqav2")
    records, digest = open_records(path, "train")
    assert len(records) == COUNT and digest == open_records(f"{path}/{shards.VERSION}", "train")[1]
    with pytest.raises(ValueError, match="has no split 'test'; its splits: train"):
        open_records(path, "test")
    mixture = read_mixture(configure(path))
    assert mixture.sources[0].family == "image QA"
    assert mixture.record(0)[1].task == "toy"


def test_sources_without_a_path_are_left_out(prepared):
    config = configure(prepared("vqav2"))
    with config.unlocked():
        config.data.sources.other = common.source("")
    assert [source.name for source in read_mixture(config).sources] == ["mine"]
    config.data.sources.mine.path = ""
    with pytest.raises(ValueError, match="expected at least one"):
        read_mixture(config)


def test_held_out_datasets_are_not_trained_on_unless_named(prepared):
    path = prepared("gqa")
    with pytest.raises(ValueError, match="gqa is held out.*add .mine. to config.data.allow"):
        read_mixture(configure(path))
    assert read_mixture(configure(path, allow_held_out=("mine",))).sources[0].name == "mine"


@pytest.mark.parametrize(
    ("field", "value"), [("sampling", "root"), ("instructions", "dataset name")]
)
def test_unknown_rules_are_refused(prepared, field, value):
    with pytest.raises(ValueError, match=f"{field} is '{value}', expected one of"):
        read_mixture(configure(prepared("vqav2"), **{field: value}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.checkpoint": "nowhere"}, "config.model.checkpoint: no checkpoint 'nowhere'"),
        ({"model.init": "nowhere"}, "config.model.init: no checkpoint 'nowhere'"),
        (
            {"model.trainable": ("qformr",)},
            r"config.model.trainable: cannot train \['qformr'\].* did you mean 'qformer'",
        ),
        ({"text.qformer_limit": 1_000}, "qformer_limit is 1000, expected at least 3 and at most"),
        ({"chat.template": "v1"}, "config.chat.template: the chat template 'v1' needs a decoder-"),
        (
            {"chat.template": "chatml", "model.checkpoint": "shapes_llama"},
            "config.chat.template: .* of another tokenizer .*'<|im_start|>'".replace("|", r"\|"),
        ),
    ],
)
def test_what_the_model_has_not_is_named_before_weights_are_read(fields, message):
    config = common.get_config()
    config.update_from_flattened_dict({"model.checkpoint": "shapes_t5", "text.qformer_limit": 34})
    check_model(config)
    config.update_from_flattened_dict(fields)
    with pytest.raises((ValueError, OSError), match=message):
        check_model(config)


def test_conversations_are_written_as_config_and_tokenizer_say(tmp_path):
    config = common.get_config()
    source = read_source("shapes_llama")
    read = lambda folder, base: read_text(config, folder, source.variant, base)
    assert type(read(source.folder, InputFormat())) is TextProcessor
    config.update_from_flattened_dict({"chat.template": "v1", "chat.limit": 99})
    text = read(source.folder, InputFormat("v0", "Be brief.", image_crop="pad"))
    assert text.input_format == InputFormat("v1", image_crop="pad", limit=99)
    chat = text.chat
    assert (chat.name, chat.limit) == ("v1", 99)
    assert read(source.folder, InputFormat("v1", "Be brief.")).chat.system == "Be brief."
    shutil.copytree(read_source("shapes_llama").folder, tmp_path / "newer")
    path = tmp_path / "newer" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "legacy": False}))
    newer = read(tmp_path / "newer", InputFormat()).chat
    assert newer.fingerprint() != chat.fingerprint()


def test_a_folder_for_traces_that_cannot_be_written_is_named(tmp_path):
    config = configure("shapes")
    config.workdir, config.model.checkpoint = str(tmp_path), "shapes_t5"
    (tmp_path / "file").write_text("")
    config.train.profile_folder = str(tmp_path / "file")
    assert read_workdir(config) == str(tmp_path)  # nothing is traced
    config.train.profile_steps = 1
    with pytest.raises(ValueError, match="config.train.profile_folder is .*/file is a file"):
        read_workdir(config)


def test_a_run_checks_its_model_before_weights_are_read(monkeypatch, tmp_path):
    config = configure("shapes")
    config.workdir = str(tmp_path / "run")
    config.model.checkpoint, config.data.batch_size = "shapes_t5", 8
    config.text.qformer_limit = 1_000
    monkeypatch.setattr(
        patch_features, "load_initial", lambda *_, **__: pytest.fail("weights were read")
    )
    monkeypatch.setattr(loop.setup, "read_mixture", lambda _: types.SimpleNamespace(table=str))
    with pytest.raises(ValueError, match="qformer_limit is 1000"):
        loop.run(config)
    assert not (tmp_path / "run").exists()
