import dataclasses
import json

import pytest

from jax_instructblip.evaluation import suite
from jax_instructblip.evaluation.metrics.metric import MetricError
from jax_instructblip.evaluation.predictions import Store
from tests.helpers.fake_pipeline import FakePipeline, make_task, record

MODEL = {"checkpoint": "a fake", "weights": "green", "dtype": "float32"}


def records(count=11):
    return [
        record(n, 3 if n % 4 else 20, answers=(str(n - n % 2),), choices=("a" * n, "b"), correct=0)
        for n in range(1, count + 1)
    ]


def run(out, tasks, blip=None, **fields):
    said = []
    blip = blip or FakePipeline()
    given = {"model": MODEL, "size": 2, "say": said.append, **fields}
    finished = suite.run(blip, tasks, out, **given)
    suite.write(out, finished, MODEL)
    return blip, finished, "\n".join(said)


def files(folder):
    found = (path for path in folder.rglob("*") if path.is_file())
    content = {str(path.relative_to(folder)): path.read_bytes() for path in found}
    if "results.json" in content:  # all but when and by which words it was made
        document = json.loads(content["results.json"])
        del document["date"], document["command"]
        content["results.json"] = document
    return content


def test_answers_scores_and_report(tmp_path):
    broken = record(50, images=(b"no image",))
    tasks = [make_task("gqa", [*records(), broken]), make_task("iconqa", records())]
    _, finished, said = run(tmp_path, tasks)
    gqa, iconqa = (each.rows for each in finished)
    assert [row.text for row in gqa] == [*map(str, range(1, 12)), ""]
    assert [row.score for row in gqa] == [float(n % 2 == 0) for n in range(1, 12)] + [0.0]
    assert "8 bytes" in gqa[-1].problem
    assert iconqa[4].candidates == ("aaaaa", "b") and iconqa[4].text == "aaaaa"
    assert iconqa[4].scores == (0.0, pytest.approx(-4 / 7))
    assert (
        "num_beams 5" in said
        and "gqa: exact_match 41.67 (12 records, standard error 14.86, 1 could" in said
    )
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["weights"] == "green" and list(document["datasets"]) == ["gqa", "iconqa"]
    assert document["datasets"]["gqa"]["settings"]["num_beams"] == 5
    assert document["datasets"]["iconqa"]["value"] == 100.0
    assert sorted(files(tmp_path)) == [
        *("predictions/gqa.json", "predictions/gqa.jsonl"),
        *("predictions/iconqa.json", "predictions/iconqa.jsonl"),
        *("report.html", "report.md", "results.json"),
    ]


@pytest.mark.parametrize("devices", [1, 4])
def test_a_run_that_was_ended_goes_on_and_writes_the_same(tmp_path, monkeypatch, devices):
    tasks = [make_task("gqa", records(40)), make_task("iconqa", records(9))]
    run(tmp_path / "whole", tasks)
    append, calls = Store.append, []

    def fail(store, rows):
        append(store, rows)
        calls.append(len(rows))
        if len(calls) == 3:
            raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "append", fail)
        with pytest.raises(OSError, match="disk is full"):
            run(tmp_path / "again", tasks)
    assert not (tmp_path / "again" / "results.json").exists()
    blip, _, said = run(tmp_path / "again", tasks, FakePipeline(batch_shards=devices))
    assert f"gqa (test): 40 records, {sum(calls)} answered already" in said
    asked = sum(len(set(prompts)) > 0 and len(prompts) for prompts, _, _ in blip.calls[:-1])
    if devices == 1:
        assert asked < 40
    assert files(tmp_path / "whole") == files(tmp_path / "again")
    blip, _, _ = run(tmp_path / "again", tasks)
    assert blip.calls == []  # what is finished is not asked again
    assert files(tmp_path / "whole") == files(tmp_path / "again")


def test_answers_of_another_model_are_not_taken(tmp_path):
    run(tmp_path, [make_task("gqa", records())])
    other = {**MODEL, "weights": "red"}
    with pytest.raises(ValueError, match="weights was 'green', now 'red'"):
        run(tmp_path, [make_task("gqa", records())], model=other)
    with pytest.raises(ValueError, match="questions was .*batch_size|batch_size was 2, now 3"):
        run(tmp_path, [make_task("gqa", records())], size=3)


def test_a_ranking_of_records_without_candidates_is_refused(tmp_path):
    bare = [dataclasses.replace(each, choices=(), correct=-1) for each in records()]
    with pytest.raises(MetricError, match="iconqa is ranked, but 11 records have no candidates"):
        run(tmp_path, [make_task("iconqa", bare)])


def test_of_many_candidates_the_best_are_kept(tmp_path):
    names = tuple("x" * (n + 1) for n in range(200))
    task = make_task("msvd_qa", records(), names)
    _, (finished,), _ = run(tmp_path, [task])
    for number, row in enumerate(finished.rows, start=1):
        assert row.text == row.candidates[0] == "x" * number
        assert len(row.scores) == 100 and list(row.scores) == sorted(row.scores, reverse=True)


def test_answers_made_elsewhere_are_scored(tmp_path):
    path = tmp_path / "given.jsonl"
    rows = [{"id": each.id, "text": each.answers[0]} for each in records()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    task = make_task("gqa", records())
    finished = suite.score_given(task, path)
    assert finished.result["value"] == 100.0
    assert [row.id for row in finished.rows] == [each.id for each in records()]
    suite.write(tmp_path / "out", [finished], {"predictions": str(path)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(MetricError, match="1 records of gqa are not in .*given.jsonl: 'r1'"):
        suite.score_given(task, path)
