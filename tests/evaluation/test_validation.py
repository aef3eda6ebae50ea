"""Validation by a dataset's own metric, also where a model lies over several processes."""

import pytest

from jax_instructblip.commands import train
from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.prepare import shards
from jax_instructblip.data.records import Record
from jax_instructblip.data.sources import open_records
from jax_instructblip.evaluation import answering, validation
from jax_instructblip.evaluation.metrics.metric import MetricError
from jax_instructblip.evaluation.predictions import Prediction
from jax_instructblip.evaluation.protocol import BENCHMARKS
from jax_instructblip.evaluation.task import open_task
from jax_instructblip.inference.pipeline import load
from jax_instructblip.training import loop
from jax_instructblip.training.metrics import read_metrics
from tests.helpers.raw_layouts import write_all
from tests.helpers.tiny import compile_cache, write_base, write_data
from tests.parallel.test_processes import ended, start, words

LIMIT = 8  # records


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    return write_base(folder / "base"), write_data(folder / "data")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    for name, raw in write_all(folder / "raw", ["iconqa", "web_capfilt"]).items():
        shards.prepare(DATASETS[name], raw, folder / "data")
    return folder / "data"


def evaluate(base, path, split, **settings):
    blip = load(base)
    records, _ = open_records(path, split)
    model = {"model": blip.model, "params": blip.params, "text": blip.text}
    return validation.evaluate(
        **model, records=records, limit=LIMIT, batch_size=8, path=str(path), split=split, **settings
    )


@pytest.mark.full
def test_two_processes_with_one_model_measure_what_one_does(files, prepared, tmp_path):
    path = prepared / "iconqa"
    with compile_cache(tmp_path / "compiled"):
        expected = evaluate(files[0], path, "test")
    assert 0 < expected["score"] < 1  # of a mean over ranked records
    fields = {
        **{"mesh.data": 1, "mesh.fsdp": 2, "train.steps": 1, "validation.path": path},
        "optimizer.warmup_steps": 0,
        **{"validation.split": "test", "validation.limit": LIMIT, "validation.batch_size": 8},
    }
    workdir = tmp_path / "run"
    found = ended(start(2, 1, words(files, workdir, **fields)))
    assert [code for _, code in found] == [0, 0], "\n".join(said for said, _ in found)
    lines = [line for line in read_metrics(workdir) if "validation/score" in line]
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["validation/score"] == pytest.approx(expected["score"])
    assert found[0][0].count("validation, before tuning") == 1
    assert "validation," not in found[1][0]


def test_a_prepared_dataset_is_measured_by_its_own_metric(files, prepared, monkeypatch):
    """All that `evaluate --datasets` does but for the files that it writes."""

    def best(blip, task, questions, *, size, take):
        take(
            [
                Prediction(each.id, text=each.choices[number % 2])
                for number, each in enumerate(chosen)
            ]
        )
        asked.append((task.name, task.split, len(questions.units), size))
        prompts.append(task.protocol.prompt)

    path, asked, prompts = prepared / "iconqa", [], []
    task = open_task(BENCHMARKS["iconqa"], path, "llama", limit=LIMIT)
    chosen = [task.without_images(number) for number in range(LIMIT)]
    monkeypatch.setattr(answering, "answer", best)
    found = evaluate(files[0], path, "test")
    right = [each.correct == number % 2 for number, each in enumerate(chosen)]
    assert found == dict.fromkeys(("accuracy", "score"), sum(right) / LIMIT)
    assert asked == [("iconqa", "test", 1, 8)]
    assert evaluate(files[0], path, "test", prompt="Q: {question}") == found
    assert prompts == [BENCHMARKS["iconqa"].prompt, "Q: {question}"]


def test_what_no_metric_belongs_to_does_not_validate(files, prepared, tmp_path):
    with pytest.raises(MetricError, match="cannot validate: nothing is scored"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(answering, "answer", lambda *args, **rest: None)
            evaluate(files[0], prepared / "web_capfilt", "train")


def test_what_cannot_be_scored_is_told_before_a_run_begins(files, prepared, tmp_path, monkeypatch):
    given = dict(zip(("model.checkpoint", "data.sources.mine.path"), files, strict=True))
    given |= {"workdir": tmp_path / "run", "validation.path": prepared / "web_capfilt"}
    given |= {"validation.split": "train"}
    begun = []
    monkeypatch.setattr(loop, "run", lambda *args, **rest: begun.append(args))
    words = [f"--config.{name}={value}" for name, value in given.items()]
    with pytest.raises(MetricError, match="validation.path is .*web_capfilt, train: nothing is sc"):
        train.main(["--config", "configs/custom_jsonl.py", *words])
    path = str(prepared / "iconqa")
    validation.check(open_records(path, "test")[0], path, "test")
    hidden = [Record("a", ("a.png",), "what?", (), choices=("b", "c"))]
    with pytest.raises(MetricError, match="iconqa, test: the right answers .* are not public"):
        validation.check(hidden, path, "test")
    assert not begun
