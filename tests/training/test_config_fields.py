"""Every field of a config has a row of type and range, and all violations are one report."""

import re

import pytest
from ml_collections import ConfigDict

from configs import common
from jax_instructblip.training.config_fields import FIELDS, SOURCE_FIELDS, check_config
from jax_instructblip.training.setup import read_workdir

NAN, INF = float("nan"), float("inf")


def changed(fields: dict) -> ConfigDict:
    """The common config with these fields, of whatever type."""
    tree = common.get_config().to_dict()
    for name, value in fields.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    return ConfigDict(tree)


def flat(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict) and prefix + name != "data.sources":
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_a_rate_by_layers_of_a_frozen_tower_is_refused():
    fields = {"optimizer.vision_layer_decay": 0.95}
    with pytest.raises(ValueError, match="vision_layer_decay is 0.95, .*the vision tower is froz"):
        check_config(changed(fields))
    check_config(changed({**fields, "model.trainable": ("vision", "qformer")}))


@pytest.mark.parametrize("prompt", ["{querstion}?", "{question"])
def test_a_prompt_of_validation_has_known_placeholders(prompt):
    with pytest.raises(ValueError, match="config.validation.prompt .*{question}, {answer}"):
        check_config(changed({"validation.prompt": prompt}))
    check_config(changed({"validation.prompt": "Question: {question} Answer:"}))


def test_every_field_of_the_common_config_has_a_row():
    names = {name for name, _ in flat(common.get_config().to_dict())} - {"data.sources"}
    assert names == set(FIELDS)
    assert set(common.source("a")) == set(SOURCE_FIELDS)


def test_the_common_config_and_an_override_of_each_kind_pass():
    check_config(common.get_config())
    check_config(changed({"seed": 2**32 - 1, "optimizer.learning_rate": 0, "data.buckets": [8]}))
    check_config(changed({"model.qformer_dropout": 0.1, "data.sources": {"a": common.source("b")}}))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("seed", 2**32, "at most 4,294,967,295"),
        ("seed", -1, "at least 0"),
        ("optimizer.learning_rate", -1e-5, "at least 0"),
        ("optimizer.learning_rate", NAN, "a finite float32"),
        ("optimizer.learning_rate", "1e-5", "a number"),
        ("optimizer.learning_rate", 30.0, "at most 1"),
        ("optimizer.b2", 1.0, "below 1"),
        ("optimizer.eps", 0.0, "above 0"),
        ("optimizer.eps", 1e-300, "above 0"),
        ("optimizer.weight_decay", -0.05, "at least 0"),
        ("optimizer.clip_norm", INF, "a finite float32"),
        ("optimizer.warmup_steps", -1, "at least 0"),
        ("model.qformer_dropout", 1.5, "below 1 or -1.0"),
        ("model.llm_dropout", -0.5, "at least 0 and below 1 or -1.0"),
        ("model.llm_dropout", None, "a number"),
        ("model.trainable", "qformer", "a tuple, each of it text"),
        ("model.trainable", (1,), "text"),
        ("model.instruction_aware", 1, "True or False"),
        ("model.checkpoint", None, "text"),
        ("data.buckets", (64, -5), "at least 1"),
        ("data.buckets", (64.0,), "a whole number"),
        ("data.buckets", 64, "a tuple"),
        ("data.batch_size", 10**7, "at most 65,536 (samples)"),
        ("data.batch_size", True, "a whole number"),
        ("data.batch_size", 8.0, "a whole number"),
        ("data.threads", 0, "at least 1"),
        ("data.workers", -1, "at least 0"),
        ("data.sampling", "root", "one of "),
        ("data.instructions", None, "one of "),
        ("data.min_decode_ratio", -0.1, "at least 0"),
        ("text.answer_limit", 1, "at least 2"),
        ("text.prompt_limit", 10**9, "at most 32,768"),
        ("train.hang_limit", 0, "above 0"),
        ("train.accumulate", 0, "at least 1"),
        ("train.profile_steps", -1, "at least 0"),
        ("checkpoints.keep", 2**31, "at most 2,147,483,647"),
        ("validation.max_new_tokens", 2.5, "a whole number"),
        ("validation.path", 3, "text"),
        ("validation.first", "yes", "True or False"),
        ("mesh.fsdp", 0, "at least 1 and at most 1,000,000 or -1"),
        ("mesh.tensor", -2, "at least 1"),
        ("workdir", "a\ud800", ""),
        ("train.hang_limit", 1e30, "at most 1,000,000,000.0 (seconds)"),
        ("validation.path", "a\0b", "cannot be the name of a file"),
    ],
)
def test_a_value_out_of_its_row_is_refused_by_name(field, value, expected):
    message = re.escape(f"config.{field}") + ".*" + re.escape(expected)
    with pytest.raises(ValueError, match=message) as error:
        check_config(changed({field: value}))
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"optimizer.warmup_steps": 100, "train.steps": 50},
            "config.optimizer.warmup_steps is 100, config.train.steps is 50: the warm-up must end",
        ),
        (
            {"optimizer.schedule": "staircase", "train.steps": 50},
            "config.optimizer.epoch_steps is 3000, config.train.steps is 50: the run must have an",
        ),
        (
            {"data.rand_augment": True, "data.augment": False},
            "rand_augment is True, config.data.augment is False: crops alone are changed further",
        ),
        ({"mesh.fsdp": -1}, "config.mesh.data and config.mesh.fsdp are -1"),
        ({"chat.system": ""}, "config.chat.system is '', config.chat.template is ''"),
        ({"chat.limit": 64}, "chat.limit is 64, config.chat.template is '': .*leave it at 2048"),
        ({"chat.image_order": "last"}, "chat.image_order is 'last', config.chat.template is ''"),
        ({"data.batch_sise": 8}, "config.data.batch_sise is unknown; did you mean config.data.bat"),
        ({"optimizer": 3}, "config.optimizer.learning_rate is missing: start from common.get_con"),
        ({"data.sources": {"a": {"path": "x"}}}, "a has the fields .'path'., expected"),
        ({"data.sources": {"a": common.source("x", weight=NAN)}}, "sources.a.weight is nan"),
        ({"data.sources": {"a": common.source("x", templates="q")}}, "a.templates is 'q', expect"),
        ({"data.sources": {"a": common.source("hdfs://x")}}, "sources.a.path is hdfs://x: this is"),
        ({"data.sources": 3}, "config.data.sources is 3, expected names with common.source"),
        ({"train.profile_folder": "s3://a"}, "config.train.profile_folder is s3://a: this is read"),
    ],
)
def test_fields_that_do_not_go_together_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        check_config(changed(fields))


def test_everything_wrong_is_one_report():
    wrong = {"train.steps": 0, "seed": None, "data.buckets": (0,), "optimizer.b1": 2.0}
    with pytest.raises(ValueError) as error:
        read_workdir(changed({"model.trainable": (), "train.profile_folder": "s3://a/b", **wrong}))
    lines = str(error.value).splitlines()
    assert lines[0] == "this config cannot be used:"
    unset = ["workdir", "model.checkpoint", "model.trainable", "data.sources"]
    named = [line.split()[0].removeprefix("config.").partition("[")[0] for line in lines[1:]]
    assert named[:4] == unset
    assert sorted(named[4:]) == sorted([*wrong, "train.profile_folder"])
