"""Whole runs of a tiny model: learning, stopping, resuming, and errors for a wrong config."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common
from jax_instructblip import checkpoint
from jax_instructblip.data import templates
from jax_instructblip.training import loop
from jax_instructblip.training.metrics import Window, read_answers, read_metrics
from jax_instructblip.training.optimizer import adamw
from tests.helpers.bucket import bucket
from tests.helpers.inject_nan import inject_nan
from tests.helpers.tiny import compile_cache, write_base, write_data

COMPILED = "/jax/core/compile/backend_compile_duration"
# Counts of a step: one sample of four slots, in a row of eight.
TEXT = {"text": np.array([4, 8]), "sizes": np.array([[1, 2, 4, 1]]), "row": np.array([8, 1])}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    with compile_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    return write_base(folder / "base"), write_data(folder / "data")


def make_config(files, folder, **fields):
    base, data = files
    config = common.get_config()
    with config.unlocked():
        config.data.sources = {"colors": common.source(str(data))}
    values = {
        "workdir": str(folder),
        "model.checkpoint": str(base),
        "model.dtype": "float32",
        "model.frozen_dtype": "float32",
        "data.batch_size": 4,
        "data.buckets": (),
        "data.threads": 1,
        "text.qformer_limit": 12,
        "text.prompt_limit": 12,
        "text.answer_limit": 6,
        "train.steps": 4,
        "train.log_every": 1,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 1,
        "checkpoints.every": 2,
    }
    config.update_from_flattened_dict(values | fields)
    return config


def run(config, **more):
    return Path(loop.run(config, **more))


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}


def manifests(workdir, step):
    folder = workdir / "checkpoints" / str(step)
    return [checkpoint.read_manifest(folder / part) for part in ("trainable", "optimizer")]


def test_a_run_learns_and_leaves_its_files(files, tmp_path, capsys):
    fields = {"train.steps": 30, "train.peak_flops": 1e12}
    workdir = run(make_config(files, tmp_path / "run", **fields))
    found = losses(workdir)
    assert 0 < read_metrics(workdir)[-1]["model_flops_utilisation"] < 1
    assert sorted(found) == list(range(1, 31))
    assert np.mean([found[step] for step in range(26, 31)]) < 0.8 * found[1]
    assert sorted(os.listdir(workdir / "checkpoints"), key=int) == ["26", "28", "30"]
    document = json.loads((workdir / "config.json").read_text())
    assert document["variant"]["llm"]["kind"] == "llama"
    assert document["config"]["optimizer"]["learning_rate"] == 1e-2
    assert document["base"]["sha256"] == checkpoint.manifest_digest(files[0])
    said = capsys.readouterr().err
    assert "colors" in said and "100.00%" in said  # the table of sources
    assert f"qformer starts from: {files[0]}" in said


# Ends its process when the checkpoint of step 2 is on the disk, as a pre-empted machine would.
INTERRUPTED = """
import os, sys
from jax_instructblip.training import loop
from jax_instructblip.commands.train import read_config

save = loop._Run.save

def save_and_die(self, number):
    save(self, number)
    self.checkpoints.wait()
    if number == 2:
        os._exit(9)

loop._Run.save = save_and_die
loop.run(read_config(sys.argv[1:]))
"""


def test_train_4_is_train_2_and_resume_2_in_a_new_process(files, tmp_path):
    fields = {"data.augment": True, "model.qformer_dropout": 0.2}
    whole = run(make_config(files, tmp_path / "whole", **fields, **{"checkpoints.every": 9}))

    config = make_config(files, tmp_path / "parts", **fields)
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"get_config = lambda: ConfigDict({config.to_dict()!r}).lock()\n"
    )
    words = [f"--config={path}"]
    first = subprocess.run([sys.executable, "-c", INTERRUPTED, *words], timeout=600)
    assert first.returncode == 9
    parts = tmp_path / "parts"
    assert os.listdir(parts / "checkpoints") == ["2"]
    second = subprocess.run(
        [sys.executable, "-m", "jax_instructblip", "train", *words],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert second.returncode == 0, second.stderr
    assert f"resuming {parts} at step 2 of 4" in second.stderr

    assert manifests(parts, 4) == manifests(whole, 4)  # sha256 of every leaf: bit for bit
    assert losses(parts) == losses(whole)
    cursors = [
        json.loads((run / "checkpoints" / "4" / "meta.json").read_text())["data"]
        for run in (whole, parts)
    ]
    assert cursors[0] == cursors[1] and cursors[0]["step"] == 4


def test_a_run_in_an_object_store_is_one_on_the_disk(files, tmp_path):
    local = run(make_config(files, tmp_path / "run", **{"train.steps": 4}))
    with bucket() as store:
        fields = {"checkpoints.keep": 1, "optimizer.warmup_steps": 1}
        address = "gs://bucket/runs/one"
        config = make_config(files, address, **fields, **{"train.steps": 4})
        original = loop._Run.save

        def save(self, number):
            original(self, number)
            self.checkpoints.wait()
            if number == 2:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Run, "save", save)
            with pytest.raises(KeyboardInterrupt):
                loop.run(config)
        assert loop.run(config) == address
        names = {path.removeprefix("/bucket/runs/one/") for path in store.store}
        assert {name for name in names if "/" not in name} == {"config.json", "metrics.jsonl"}
        assert any(name.startswith("tensorboard/") for name in names)
        kept = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
        assert kept == {"4"}
        lines = store.store["/bucket/runs/one/metrics.jsonl"].getvalue().decode().splitlines()
        found = {each["step"]: each["loss"] for each in map(json.loads, lines)}
        assert found == losses(local)
        for part in ("trainable", "optimizer"):
            path = f"/bucket/runs/one/checkpoints/4/{part}/manifest.json"
            mine = checkpoint.read_manifest(local / "checkpoints" / "4" / part)
            assert json.loads(store.store[path].getvalue()) == mine


def test_a_finished_run_is_left_as_it_is(files, tmp_path):
    config = make_config(files, tmp_path / "run", **{"train.steps": 2})
    loop.run(config)
    before = manifests(tmp_path / "run", 2), losses(tmp_path / "run")
    loop.run(config)
    assert (manifests(tmp_path / "run", 2), losses(tmp_path / "run")) == before


def test_a_changed_field_is_said_and_other_data_are_refused(files, tmp_path, capsys):
    workdir = tmp_path / "run"
    loop.run(make_config(files, workdir, **{"train.steps": 2}))
    capsys.readouterr()
    loop.run(make_config(files, workdir, **{"train.steps": 3, "optimizer.b2": 0.99}))
    said = capsys.readouterr().err
    assert "changed: config.optimizer.b2 was 0.999, now 0.99" in said
    assert "changed: config.train.steps was 2, now 3" in said
    with pytest.raises(ValueError, match="other data: seed was 0, now 1; fingerprint was"):
        loop.run(make_config(files, workdir, **{"seed": 1}))
    with pytest.raises(ValueError, match="fingerprint was"):
        loop.run(make_config(files, workdir, **{"data.batch_size": 2}))


def test_another_frozen_base_or_variant_is_refused(files, tmp_path):
    workdir = tmp_path / "run"
    loop.run(make_config(files, workdir, **{"train.steps": 2}))
    leaves = checkpoint.flatten(checkpoint.read_tree(files[0]))
    leaves["llm/norm/scale"] = leaves["llm/norm/scale"] * 2
    other = tmp_path / "other"

    def add(partial):
        shutil.copytree(files[0], partial, dirs_exist_ok=True, ignore=_only_extras)

    checkpoint.write_tree(other, leaves.items(), extra=add)
    with pytest.raises(checkpoint.CheckpointError, match="tuned on the frozen base"):
        loop.run(make_config(files, workdir, **{"model.checkpoint": str(other)}))
    with pytest.raises(checkpoint.CheckpointError, match="instruction_aware is True, .* has False"):
        loop.run(make_config(files, workdir, **{"model.instruction_aware": False}))


def _only_extras(folder, names):
    return [name for name in names if name in ("params", "manifest.json")]


def test_validation_chooses_the_best_checkpoint(files, tmp_path, capsys):
    scores = iter([0.1, 0.3, 0.9, 0.2, 0.4])
    seen = []

    def evaluate(
        *,
        model,
        params,
        text,
        records,
        mesh,
        limit,
        batch_size,
        max_new_tokens,
        path,
        split,
        prompt,
        style,
        upright,
        take_samples,
    ):
        assert style == templates.PAPER and upright and prompt == "{question}!"
        seen.append((sorted(params), len(records), limit, batch_size, max_new_tokens))
        take_samples([{"id": "a", "prompt": "what|?", "answers": ("red",), "text": f"{len(seen)}"}])
        return {"cider": 0.5, "score": next(scores), "color": 0.5}

    fields = {"validation.path": str(files[1]), "validation.every": 1, "validation.limit": 7}
    fields |= {"checkpoints.keep": 1, "validation.max_new_tokens": 5}
    fields |= {"validation.prompt": "{question}!"}
    workdir = run(make_config(files, tmp_path / "run", **fields), evaluate=evaluate)
    assert seen == [(["llm", "qformer", "vision"], 12, 7, 64, 5)] * 5
    measured = [line for line in read_metrics(workdir) if "validation/score" in line]
    assert {line["validation/cider"] for line in measured} == {0.5}
    lines = {line["step"]: line["validation/score"] for line in measured}
    assert lines == {0: 0.1, 1: 0.3, 2: 0.9, 3: 0.2, 4: 0.4}
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "4"]
    assert capsys.readouterr().err.count("validation, step 2: cider 50.0") == 1
    answers = [(line["step"], line["text"]) for line in read_answers(workdir)]
    assert answers == [(0, "1"), (1, "2"), (2, "3"), (3, "4"), (4, "5")]
    told = {"id": "a", "prompt": "what|?", "answers": ["red"]}
    assert read_answers(workdir)[2] == {"step": 2, "text": "3", **told}


def test_a_loss_that_is_not_finite_stops_the_run(files, tmp_path, monkeypatch):
    rate = lambda _: 1e30
    monkeypatch.setattr(loop.run_length, "make_optimizer", lambda config: (adamw(rate), rate))
    config = make_config(files, tmp_path / "run")
    with pytest.raises(ValueError, match=r"step \d: loss .*samples: train:\d+, .*learning_rate"):
        loop.run(config)
    saved = (tmp_path / "run" / "checkpoints").glob("*")
    for step in (path.name for path in saved):  # nothing that cannot be trusted was saved
        tree = checkpoint.read_tree(tmp_path / "run" / "checkpoints" / step / "trainable")
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_spoilt_steps_are_skipped_and_written_down_until_they_are_too_many(
    files, tmp_path, monkeypatch
):
    with_nan = inject_nan(loop.compile_step, {2, 3, 6, 7, 8, 9})
    monkeypatch.setattr(loop, "compile_step", with_nan)
    fields = {"train.non_finite": "skip", "train.non_finite_limit": 3, "train.log_every": 2}
    config = make_config(files, tmp_path / "run", **fields, **{"train.steps": 12})
    with pytest.raises(ValueError, match=r"step 8: loss nan.* 3 in a row.*checkpoints/[46]"):
        loop.run(config)
    lines = read_metrics(tmp_path / "run")
    assert [(line["step"], line["skipped"]) for line in lines] == [(1, 0), (2, 1), (4, 1), (6, 1)]
    assert [np.isfinite(line["loss"]) for line in lines if "loss" in line] == [True] * 3
    noted = (tmp_path / "run" / "non_finite.jsonl").read_text().splitlines()
    noted = [json.loads(line) for line in noted]
    assert [each["step"] for each in noted] == [2, 3, 6, 7, 8]
    assert all(len(each["samples"]) == 4 and each["loss"] == "nan" for each in noted)
    tree = checkpoint.read_tree(tmp_path / "run" / "checkpoints" / "6" / "trainable")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_what_is_computed_again_is_no_use_of_the_peak(files, tmp_path):
    done = []
    for remat in ("none", "full"):
        fields = {"model.remat.llm": remat, "train.peak_flops": 1e12, "train.log_every": 4}
        line = read_metrics(run(make_config(files, tmp_path / remat, **fields)))[-1]
        done.append(line["model_tflops_per_second"] / line["steps_per_second"])
    assert done[0] == pytest.approx(done[1], rel=1e-9)


def test_time_is_split_and_starts_anew():
    window = Window(2)
    counts = {"replaced": np.zeros(2), "truncated": np.zeros((2, 3)), **TEXT}
    for spent in (0.1, 0.0):
        with window.timed("data"):
            time.sleep(spent)
        time.sleep(0.1)
        window.add({"loss": 1.0}, counts)
        values = window.close()
        assert 0.2 < values["data_share"] < 0.8 if spent else values["data_share"] < 0.1
        assert values["checkpoint_share"] == 0


def test_what_was_cut_or_replaced_is_counted():
    window = Window(2)
    for replaced in ([0, 3], [0, 0]):
        counts = {"replaced": np.array(replaced), "truncated": np.array([[1, 0, 1], [1, 0, 0]])}
        window.add({"loss": 1.0}, {**TEXT, **counts, "text": np.array([3, 8])})
    values = window.close()
    assert values["padding_share"] == 0.625
    assert {name: values[name] for name in values if "replaced" in name or "trunc" in name} == {
        "replaced": 1,
        "truncated_instruction": 4,
        "truncated_answer": 2,
    }


def test_compiles_nothing_after_the_first_steps(files, tmp_path, monkeypatch):
    compiled, at_step = [0], []

    def count(event, duration, **_):
        compiled[0] += event == COMPILED

    make = loop.compile_step
    steps = []

    def counting(**settings):
        step = make(**settings)

        def call(*arguments):
            at_step.append(compiled[0])
            return step(*arguments)

        steps.append(step)
        return call

    monkeypatch.setattr(loop, "compile_step", counting)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        loop.run(make_config(files, tmp_path / "run", **{"train.log_every": 2}))
        assert len(at_step) == 4
        assert at_step[3] == at_step[2] > at_step[0]
        assert steps[0]._cache_size() == 1
        before = compiled[0]
        jax.jit(lambda x: x * 1.5 + at_step[3])(np.ones(7, np.float32))
        assert compiled[0] > before  # a forced one is seen
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workdir": ""}, "config.workdir is not set"),
        ({"model.checkpoint": ""}, "config.model.checkpoint is not set"),
        ({"train.steps": 0, "data.batch_size": 0}, r"batch_size is 0.*\n.*steps is 0"),
        ({"optimizer.schedule": "linear"}, "'linear', expected one of cosine, staircase"),
        ({"optimizer.warmup_steps": 9}, "optimizer.warmup_steps is 9, config.train.steps is 4"),
        ({"data.sources.colors.path": "/nowhere.jsonl"}, "config.data.sources.colors: .*nowhere"),
        ({"data.sources.colors.templates": "questions"}, "templates is 'questions'"),
        ({"model.trainable": ("qformr",)}, "did you mean 'qformer'"),
        ({"text.qformer_limit": 200}, "qformer_limit is 200"),
        ({"mesh.tensor": 3}, "does not use the"),
        ({"model.dtype": "float15"}, "model.dtype is 'float15', expected one of float32, bfloat16"),
        ({"model.frozen_dtype": "int3"}, "model.frozen_dtype is 'int3', expected one of float32"),
        ({"validation.batch_size": 0}, "validation.batch_size is 0, expected at least 1"),
        ({"train.accumulate": 3}, "batch_size is 4; to be worked on in 3 parts .* a multiple of 3"),
        ({"train.accumulate": 0}, "train.accumulate is 0, expected at least 1"),
        ({"workdir": "az://bucket/run"}, "az://bucket/run cannot be used: .*pip install adlfs"),
        ({"workdir": f"{__file__}/run"}, "config.workdir is .*test_loop.py is a file"),
        ({"model.checkpoint": "hdfs://a/b"}, "model.checkpoint is hdfs://a/b: this is read"),
        ({"data.sources.colors.path": "hdfs://a"}, "sources.colors.path is hdfs://a: this is"),
        ({"train.non_finite": "go"}, "train.non_finite is 'go', expected one of stop, skip"),
        ({"parallel.mode": "map"}, "parallel.mode is 'map', expected one of jit, pmap"),
        ({"model.remat.llm": "some"}, "remat.llm is 'some', expected one of none, dots, full"),
    ],
)
def test_refuses_a_config_that_cannot_be_run(files, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        loop.run(make_config(files, tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists()
