"""Functions of the package: each does what its verb does; its result is input for the next."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

import jax_instructblip
from jax_instructblip import checkpoint
from jax_instructblip.__main__ import find_verbs, main
from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.prepare import shards
from jax_instructblip.evaluation import benchmarks
from jax_instructblip.training.config_file import load_config
from jax_instructblip.training.metrics import read_metrics
from tests.commands.test_merge import write_run
from tests.helpers.fake_pipeline import FakePipeline
from tests.helpers.raw_layouts import write_all
from tests.helpers.tiny import compile_cache, write_base, write_data
from tests.test_imports import PACKAGE

CONFIG = PACKAGE.parent / "configs" / "custom_jsonl.py"
MEASURED = ("date", "command")  # of results.json, what another call has otherwise


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("entry") / "base", "t5")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("entry") / "run"
    return write_run(folder, base, metrics=[(2, 0.75), (4, 0.5)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("entry") / "data", count=6)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with compile_cache(tmp_path_factory.mktemp("compiled")):
        yield


def content(folder):
    """Every file below the folder, but for what Orbax notes of times and processes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(("params", "files"))
    }


def fields(base, data, workdir):
    return {
        "workdir": workdir,
        "model.checkpoint": base,
        "model.dtype": "float32",
        "model.frozen_dtype": "float32",
        "data.sources.mine.path": data,
        "data.batch_size": 4,
        "data.buckets": (),
        "data.threads": 1,
        "train.steps": 2,
        "optimizer.warmup_steps": 1,
        "validation.path": data,
        "validation.limit": 2,
        "validation.batch_size": 2,
        "validation.max_new_tokens": 2,
    }


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir) if "loss" in line]


def test_export_and_convert_are_their_verbs(base, tmp_path, capsys):
    out = jax_instructblip.export(base, tmp_path / "hf", shard_bytes=40_000)
    assert out == tmp_path / "hf"
    words = [str(base), "--out", str(tmp_path / "other"), "--shard_bytes", "40000"]
    assert main(["export", *words]) == 0
    said, other = capsys.readouterr().out.splitlines()
    assert said.replace("hf:", "other:") == other
    assert len(list(out.glob("*.safetensors"))) > 1
    assert content(out) == content(tmp_path / "other")

    made = jax_instructblip.convert(out, tmp_path / "ours")
    assert made == tmp_path / "ours"
    assert main(["convert", str(out), "--out", str(tmp_path / "again")]) == 0
    assert content(made) == content(tmp_path / "again")
    expected = dict(checkpoint.read_leaves(base))
    for path, leaf in checkpoint.read_leaves(made):
        np.testing.assert_array_equal(leaf, expected[path], path)
    with pytest.raises(ValueError, match="is not tiny-vicuna"):
        jax_instructblip.convert(str(out), str(tmp_path / "never"), variant="tiny-vicuna")


@pytest.mark.parametrize(
    ("chosen", "flags"), [({}, []), ({"step": 2}, ["--step", "2"]), ({"best": True}, ["--best"])]
)
@pytest.mark.parametrize("verb", ["merge", "export"])
def test_one_checkpoint_of_a_run_is_written_as_by_the_verb(run, tmp_path, verb, chosen, flags):
    out = getattr(jax_instructblip, verb)(run, tmp_path / "out", **chosen)
    assert main([verb, str(run), "--out", str(tmp_path / "other"), *flags]) == 0
    assert content(out) == content(tmp_path / "other") != {}


def test_a_step_and_the_best_one_exclude_each_other(run, tmp_path):
    with pytest.raises(ValueError, match="choose one of the two"):
        jax_instructblip.merge(run, tmp_path / "out", step=2, best=True)


@pytest.mark.parametrize("out", ["", None, 5, b"x", ".", "hdfs://bucket/x"])
@pytest.mark.parametrize("verb", ["convert", "export", "merge"])
def test_what_is_no_place_for_a_new_folder(base, tmp_path, monkeypatch, verb, out):
    """The empty text was the present folder, which was renamed away from under its reader."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="out is|is the present folder"):
        getattr(jax_instructblip, verb)(base, out)
    (tmp_path / "new").touch()  # the present folder is still this one
    assert Path("new").exists() and main([verb, str(base), "--out", ""]) == 1


@pytest.mark.parametrize("config", [5, None, "", "hdfs://bucket/config.py"])
def test_what_is_no_config_is_said(config):
    with pytest.raises(ValueError, match="the config is"):
        jax_instructblip.train(config)
    with pytest.raises(ValueError, match="unknown field config.5"):
        jax_instructblip.train(CONFIG, {5: 1})


def test_train_is_its_verb(base, data, tmp_path):
    ours, verb = tmp_path / "ours", tmp_path / "verb"
    given = fields(base, data, ours) | {"validation.path": ""}
    assert jax_instructblip.train(CONFIG, given) == str(ours)
    words = [f"--config.{name}={value}" for name, value in given.items()]
    assert main(["train", f"--config={CONFIG}", *words, f"--config.workdir={verb}"]) == 0
    assert len(losses(ours)) == 2 and losses(ours) == losses(verb)
    weights = [folder / "checkpoints/2/trainable/manifest.json" for folder in (ours, verb)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    configs = [json.loads((each / "config.json").read_text())["config"] for each in (ours, verb)]
    assert configs[0] | {"workdir": str(verb)} == configs[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train.step": 3}, "unknown field config.train.step; did you mean config.train.steps?"),
        (
            {"steps": 3, "sed": 1},
            "config.steps; did you mean .*\n.*config.sed; did you mean config",
        ),
        ({"train.steps": "3"}, "config.train.steps is '3', expected a value of type int"),
        ({"train.steps": 0}, "config.train.steps is 0, expected at least 1"),
        ({"data.sources.mine.path": "/nowhere.jsonl"}, "config.data.sources.mine: .*nowhere"),
        ({"validation.path": "/nowhere.jsonl"}, "config.validation.path cannot be used: .*nowhere"),
    ],
)
def test_what_cannot_be_trained_is_said(base, data, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        jax_instructblip.train(CONFIG, fields(base, data, tmp_path / "run") | given)


def test_evaluate_by_families_is_its_verb(base, data, tmp_path, capsys):
    given = dict(data=data, max_new_tokens=2, limit=4, split="test")
    results = jax_instructblip.evaluate(base, out=tmp_path / "ours", **given)
    said = capsys.readouterr().out
    words = [f"--{name}={value}" for name, value in given.items()]
    out = tmp_path / "verb"
    assert main(["evaluate", f"--checkpoint={base}", f"--out={out}", *words]) == 0
    assert capsys.readouterr().out.replace(str(out), str(tmp_path / "ours")) == said
    assert results == json.loads((tmp_path / "ours" / "results.json").read_text())
    assert (results["kind"], results["command"]) == ("families", "")
    other = json.loads((out / "results.json").read_text())
    for name in MEASURED:
        del results[name], other[name]
    assert results == other and set(results["datasets"]["test"]["baselines"]) >= {"blind"}


def test_a_run_of_a_config_is_measured_beside_its_start(base, data, tmp_path):
    config = load_config(CONFIG)
    before = config.to_json()
    workdir = jax_instructblip.train(config, fields(base, data, tmp_path / "run"))
    assert config.to_json() == before
    assert any("validation/score" in line for line in read_metrics(workdir))
    results = jax_instructblip.evaluate(workdir, max_new_tokens=2)  # on what it was validated on
    assert results["data"] == str(data) and (tmp_path / "run" / "report.html").is_file()
    assert {"blind", "before"} <= set(results["datasets"]["test"]["baselines"])


def test_evaluate_of_datasets_is_its_verb(base, tmp_path, monkeypatch, capsys):
    raw = write_all(tmp_path / "raw", ["gqa", "iconqa"])
    for name, folder in raw.items():
        shards.prepare(DATASETS[name], folder, tmp_path / "data")
    monkeypatch.setattr(benchmarks, "load", lambda *args, **given: FakePipeline())
    ours, verb = tmp_path / "ours", tmp_path / "verb"
    given = dict(datasets=["gqa", "iconqa"], data=tmp_path / "data", limit=4)
    results = jax_instructblip.evaluate(base, out=ours, **given)
    said = capsys.readouterr().out
    words = [f"--data={tmp_path / 'data'}", "--datasets=gqa, iconqa", "--limit=4"]
    assert main(["evaluate", f"--checkpoint={base}", f"--out={verb}", *words]) == 0
    assert capsys.readouterr().out.replace(str(verb), str(ours)) == said
    other = json.loads((verb / "results.json").read_text())
    assert results["datasets"] == other["datasets"] and list(other["datasets"]) == given["datasets"]

    made = ours / "predictions" / "iconqa.jsonl"
    del given["limit"]
    with pytest.raises(ValueError, match="--predictions is of one dataset"):
        jax_instructblip.evaluate(predictions=made, out=tmp_path / "scored", **given)
    path = tmp_path / "all.jsonl"
    jax_instructblip.evaluate(base, out=tmp_path / "whole", **given)
    path.write_bytes((tmp_path / "whole" / "predictions" / "iconqa.jsonl").read_bytes())
    given["datasets"] = "iconqa"
    scored = jax_instructblip.evaluate(predictions=path, out=tmp_path / "scored", **given)
    assert scored["predictions"] == str(path) and scored["datasets"]["iconqa"]["count"] > 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beam": 2}, "unknown setting 'num_beam'; did you mean 'num_beams'"),
        ({"mode": "ranks"}, "mode is 'ranks', expected one of rank, generate"),
        ({"prompt": "x"}, "--prompt: only used with --datasets"),
        ({"datasets": "gqa", "data": "a"}, "--out: needed by --datasets"),
        ({"checkpoint": None}, "--checkpoint: needed"),
        ({"out": "hdfs://a/b"}, "out is hdfs://a/b: this is read from a disk, or written"),
        ({"num_beams": 0, "data": "shapes", "out": "x"}, "num_beams is 0, expected at least 1"),
        ({"batch_size": 0, "data": "shapes", "out": "x"}, "batch_size is 0, expected at least 1"),
        ({"datasets": 5, "data": "a", "out": "x"}, "datasets is 5, expected a list of names or"),
        ({"data": 5, "out": "x"}, "data is 5, expected text or a Path"),
        ({"data": "shapes", "out": ""}, "out is empty: give a path"),
        ({"data": "shapes", "out": "x", "split": 5}, "split is 5, expected text"),
        ({"limit": 2.5, "data": "shapes", "out": "x"}, "limit is 2.5, expected a whole number"),
        ({"limit": -1, "data": "shapes", "out": "x"}, "limit is -1, expected at least 0"),
        ({"datasets": ["gqa"], "data": "a", "out": "x", "fsdp": "2"}, "fsdp is '2', expected a wh"),
        ({"datasets": ["gqa", 3], "data": "a", "out": "x"}, r"datasets has \[3\], expected names"),
    ],
)
def test_what_cannot_be_evaluated_is_said(base, given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        jax_instructblip.evaluate(**{"checkpoint": base, **given})
    assert list(tmp_path.iterdir()) == []


def test_every_function_is_told_of_and_says_what_it_takes():
    verbs = {"convert", "evaluate", "export", "merge", "train"}
    assert {*jax_instructblip.__all__} == {*verbs, "Answer", "load"} and verbs <= set(find_verbs())
    for name in jax_instructblip.__all__:
        assert name in (jax_instructblip.__doc__ or ""), name
    for name in verbs:
        function = getattr(jax_instructblip, name)
        told = inspect.getdoc(function) or ""
        assert all(
            f"\n  {each}: " in told
            for each in inspect.signature(function).parameters
            if each != "settings"
        ), name
        assert "\nReturns:\n" in told and "\nRaises:\n" in told


def test_no_part_of_the_package_hides_a_function():
    """A part binds its name in the package as soon as anything of it is imported."""
    parts = {path.stem for path in PACKAGE.iterdir()}
    assert not parts & {*jax_instructblip.__all__}
