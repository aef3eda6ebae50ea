import json
import types
from typing import Any

import pytest
from PIL import Image

from jax_instructblip.__main__ import main
from jax_instructblip.data.records import Record
from jax_instructblip.evaluation import benchmarks
from jax_instructblip.evaluation.external_answers import read_given
from jax_instructblip.evaluation.judged_answers import write_answers
from jax_instructblip.evaluation.predictions import Prediction
from tests.data.readers.test_llava_bench import ROW, write
from tests.helpers.fake_pipeline import FakePipeline
from tests.helpers.tiny import write_base


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The flags of an evaluation of three questions, one of them about an image that is damaged."""
    monkeypatch.setattr(benchmarks, "load", lambda *args, **fields: FakePipeline())
    raw = tmp_path / "llava_bench_wild"
    (raw / "images").mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (9, 7), (number,) * 3).save(raw / f"images/00{number}.png")
    (raw / "images/003.png").write_bytes(b"no image")
    rows = [
        ROW | {"image": f"00{number}.jpg", "question_id": number, "category": kind}
        for number, kind in ((1, "conv"), (2, "detail"), (3, "complex"))
    ]
    write(raw / "questions.jsonl", *rows)
    base = write_base(tmp_path / "base", "t5")
    given = {"checkpoint": base, "data": tmp_path, "out": tmp_path / "out"}
    return ["evaluate", *(f"--{name}={value}" for name, value in given.items())]


def test_answers_are_written_for_a_judge(words, tmp_path, capsys):
    assert main([*words, "--datasets=llava_bench_wild"]) == 0
    said = "NOT SCORED, a judge compares its answers, which are in answers/llava_bench_wild.jsonl"
    assert f"llava_bench_wild: {said}" in capsys.readouterr().out
    path = tmp_path / "out/answers/llava_bench_wild.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    problem = rows[2].pop("metadata")["problem"]
    assert "not an image that can be read" in problem
    common = {"prompt": "What is it?", "model_id": "base"}
    good = {"metadata": {}, **common}
    assert rows == [
        {"question_id": 1, "text": "1", "image": "001.png", "category": "conv", **good},
        {"question_id": 2, "text": "2", "image": "002.png", "category": "detail", **good},
        {"question_id": 3, "text": "", "image": "003.png", "category": "complex", **common},
    ]
    assert [row.text for row in read_given(path)] == ["1", "2", ""]
    report = (tmp_path / "out/report.md").read_text()
    assert "a judge compares its answers" in report


def test_an_id_stays_that_of_its_question(tmp_path):
    """A judge looks for the question of an answer by the text of its id."""
    names = ["7", "007", "\u0663", "-1", "0", "a", "9" * 5000]
    records = [Record(name, ("a.png",), "What?", ()) for name in names]
    task: Any = types.SimpleNamespace(name="own", records=records)
    write_answers(tmp_path, task, [Prediction(name) for name in names], "model")
    rows = map(json.loads, (tmp_path / "answers/own.jsonl").read_text().splitlines())
    found = [row["question_id"] for row in rows]
    assert found == [7, "007", "\u0663", "-1", 0, "a", "9" * 5000]
    assert [str(each) for each in found] == names
