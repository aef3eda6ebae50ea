"""Which data a configuration may train on."""

import dataclasses

import pytest

from configs import common
from jax_instructblip.data import prepare
from jax_instructblip.data.sources import open_records
from jax_instructblip.training.setup import read_mixture
from tests.data.toy import COUNT, TOY, write_raw


@pytest.fixture
def prepared(tmp_path):
    """Writes a small dataset under a name of the table."""
    raw = write_raw(tmp_path / "raw")

    def write(name):
        toy = dataclasses.replace(TOY, name=name, files={"train": ()})
        prepare.prepare(toy, raw, tmp_path / "data")
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
    assert len(records) == COUNT and digest == open_records(f"{path}/{prepare.VERSION}", "train")[1]
    with pytest.raises(ValueError, match="has no split 'test'; its splits: train"):
        open_records(path, "test")
    mixture = read_mixture(configure(path))
    assert mixture.sources[0].family == "image QA"
    assert mixture.record(0)[1].task == "toy"


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
