"""Runs that are started again after a stop, a failure or the loss of a part of their workdir."""

import json
import os
import signal
from functools import partial

import pytest

from jax_instructblip.training import loop
from jax_instructblip.training.metrics import read_metrics
from tests.helpers.tiny import compile_cache, write_base, write_data
from tests.training.test_loop import losses, make_config, run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    with compile_cache(folder / "compiled"):
        yield write_base(folder / "base"), write_data(folder / "data")


def test_an_error_while_answering_loses_no_step(files, tmp_path, capsys):
    """The step is saved first; what was not measured is, when the run goes on."""
    asked = []

    def evaluate(*, fails=(), **_):
        asked.append(len(asked))
        if asked[-1] in fails:
            raise RuntimeError("out of memory")
        return {"accuracy": asked[-1] / 10, "score": asked[-1] / 10}

    fields = {"validation.path": str(files[1]), "validation.every": 2, "validation.first": False}
    config = make_config(files, tmp_path / "run", **fields, **{"checkpoints.every": 4})
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.run(config, evaluate=partial(evaluate, fails=[0]))
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["2"]
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.run(config, evaluate=partial(evaluate, fails=[2]))
    workdir = run(config, evaluate=evaluate)
    assert "resuming" in capsys.readouterr().err
    lines = read_metrics(workdir)
    found = {line["step"]: line for line in lines if "validation/accuracy" in line}
    assert {step: line["validation/accuracy"] for step, line in found.items()} == {2: 0.1, 4: 0.3}
    score = lambda step: json.loads((workdir / f"checkpoints/{step}/meta.json").read_text())[
        "score"
    ]
    assert (score(2), score(4)) == (0.1, 0.3)
    assert sorted(losses(workdir)) == [1, 2, 3, 4]
    run(config, evaluate=evaluate)  # it has ended: nothing is measured again
    assert len(asked) == 4


def test_ctrl_c_saves_and_the_run_goes_on(files, tmp_path, capfd, monkeypatch):
    record = loop._Run.record

    def press(self, number, *given):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return record(self, number, *given)

    fields = {"checkpoints.every": 9, "train.steps": 6, "validation.path": str(files[1])}
    fields |= {"validation.every": 3, "validation.first": False}
    config = make_config(files, tmp_path / "run", **fields)
    answers = []
    evaluate = lambda **_: answers.append(0) or {"accuracy": 0.5, "score": 0.5}
    monkeypatch.setattr(loop._Run, "record", press)
    workdir = run(config, evaluate=evaluate)
    assert os.listdir(workdir / "checkpoints") == ["3"] and not answers
    said = capfd.readouterr().err
    assert "Ctrl-C: saving, then ending" in said and "told to stop: saved step 3" in said
    run(config, evaluate=evaluate)
    assert sorted(losses(workdir)) == [1, 2, 3, 4, 5, 6] and len(answers) == 2


def test_metrics_without_checkpoints_are_not_wiped(files, tmp_path, capsys):
    workdir = run(make_config(files, tmp_path / "run"))
    metrics = (workdir / "metrics.jsonl").read_bytes()
    (workdir / "checkpoints").rename(tmp_path / "unmounted")
    config = make_config(files, workdir, **{"checkpoints.every": 9})
    for make in ((workdir / "checkpoints").mkdir, lambda: None):  # an empty mount point, too
        make()
        with pytest.raises(ValueError, match=r"metrics.jsonl tells of a run of 4 steps.*FRESH=1"):
            loop.run(config)
        assert (workdir / "metrics.jsonl").read_bytes() == metrics
    (workdir / "checkpoints").rmdir()
    (workdir / "checkpoints").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"checkpoints is a link to .*nowhere.*FRESH=1"):
        loop.run(config)
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    capsys.readouterr()
    run(config, fresh=True)
    said = capsys.readouterr().err
    assert f"the metrics of its 4 steps are now {workdir / 'metrics.aside.jsonl'}" in said
    assert (workdir / "metrics.aside.jsonl").read_bytes() == metrics
    assert sorted(losses(workdir)) == [1, 2, 3, 4]
    assert os.listdir(workdir / "checkpoints") == ["4"]


def test_a_run_killed_before_its_first_save_starts_over_by_itself(files, tmp_path, monkeypatch):
    config = make_config(files, tmp_path / "run")

    def fail(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(loop._Run, "save", fail)
    with pytest.raises(RuntimeError, match="killed"):
        loop.run(config)
    monkeypatch.undo()
    early = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    workdir = run(config)
    assert sorted(losses(workdir)) == [1, 2, 3, 4]
    assert (workdir / "metrics.aside.jsonl").read_bytes() == early


def test_what_an_earlier_run_left_damaged_is_told_and_not_in_the_way(files, tmp_path, capsys):
    workdir = run(make_config(files, tmp_path / "run"))
    (workdir / "checkpoints" / "4" / "meta.json").unlink()
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(b'\0\0\n{"step": 3, "lo\n')
    (workdir / "config.json").write_text("{")
    capsys.readouterr()
    run(make_config(files, workdir))
    said = capsys.readouterr().err
    assert "checkpoints/4 is no complete checkpoint" in said and "resuming" in said
    assert "2 damaged lines of" in said and "config.json is damaged" in said
    assert sorted(losses(workdir)) == [1, 2, 3, 4]
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "4", "4.incomplete"]
    assert json.loads((workdir / "config.json").read_text())["saved"] is True
