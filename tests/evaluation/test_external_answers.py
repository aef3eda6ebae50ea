import json

import pytest

from jax_instructblip.commands import evaluate
from jax_instructblip.evaluation.benchmarks import open_tasks
from jax_instructblip.evaluation.external_answers import complete, read_given
from jax_instructblip.evaluation.metrics.metric import MetricError
from jax_instructblip.evaluation.predictions import Prediction
from jax_instructblip.evaluation.settings import Settings
from jax_instructblip.evaluation.suite import score_given
from tests.helpers.fake_pipeline import make_task, record


def write(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": 7, "text": "a"}, "", {"id": "8", "scores": [1, 2]}],
        [
            {"question_id": 7, "text": "a", "answer_id": "x", "model_id": "m", "metadata": {}},
            {"id": "8", "scores": [1, 2]},
        ],
        ['[{"question_id": 7, "answer": "a"},', ' {"id": "8", "scores": [1, 2]}]'],
        ['[{"image_id": 7, "caption": "a"}, {"id": "8", "scores": [1, 2]}]'],
    ],
)
def test_all_layouts_give_the_same_rows(tmp_path, rows):
    path = write(tmp_path / "p.jsonl", *rows)
    assert read_given(path) == [Prediction("7", text="a"), Prediction("8", scores=(1, 2))]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1}, {"id": 2}], "2 rows of .* are no answers:\n  .*:1: it has none of text, "),
        ([{"id": 1, "prompt": "?", "answers": ["a"]}], ":1: it has none of text, scores, problem"),
        ([{"question_id": 1}], ":1: it has none of text"),
        ([{"id": 1, "answer": "a"}], ":1: unknown field 'answer'; did you mean 'text'"),
        ([{"id": 1, "txet": "a"}], ":1: unknown field 'txet'; did you mean 'text'"),
        ([{"text": "a"}], ":1: expected an object with `id`"),
        ([{"id": None, "text": "a"}], "id is null, expected text or a whole number"),
        ([{"id": True, "text": "a"}], "id is true or false, expected text or a whole number"),
        ([{"id": [1], "text": "a"}], "id is a list, expected text or a whole number"),
        ([{"id": 1, "text": None}], "text is null, expected text"),
        ([{"id": 1, "text": ["a"]}], "text is a list, expected text"),
        ([{"question_id": 1, "answer": 3}], "text is int 3, expected text"),
        ([{"question_id": 1, "answer": "a", "text": "b"}], "are both given"),
        ([{"id": 1, "scores": [None]}], "scores is a list, expected a list of finite numbers"),
        ([{"id": 1, "scores": "ab"}], "scores is text, expected a list of finite numbers"),
        (['{"id": 1, "scores": [NaN]}'], "NaN is no number here"),
        (['{"id": 1, "scores": [1%s]}' % ("0" * 400)], "expected a list of finite numbers"),
        ([{"id": 1, "text": "a", "candidates": [1]}], "candidates is .*, expected a list of texts"),
        ([{"id": 1, "text": "a"}, {"id": "1", "text": "b"}], "1 ids are there more than once: '1'"),
        (['{"id": 1, "text": "a", "text": "b"}'], ':1: .*key "text" twice in one object'),
        ([{"id": 1, "text": ""}, {"id": 2, "text": " "}], "none of its 2 rows holds an answer"),
        ([{"id": 1, "problem": "no image"}], "none of its 1 rows holds an answer"),
        ([], "holds no answers"),
        (["", " "], "holds no answers"),
        (["[]"], "holds no answers"),
        (['[{"id": 1, "text": "a"'], "p.jsonl is not valid JSON"),
        (["[1]"], r"p.jsonl\[0\]: expected an object with `id`"),
        (["[" * 100_000], "p.jsonl is not valid JSON"),
        (['{"a":' * 100_000], ":1: not valid JSON"),
        (["no json"], "1 rows of .* are no answers:\n  .*:1: "),
    ],
)
def test_what_is_no_answer_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_given(write(tmp_path / "p.jsonl", *rows))


def test_every_bad_row_is_named(tmp_path):
    path = write(tmp_path / "p.jsonl", {"id": 1}, {"id": 2, "text": 5}, {"id": 3, "text": "a"})
    with pytest.raises(MetricError, match="2 rows .*\n.*:1: .*\n.*:2: text is int 5"):
        read_given(path)


def test_empty_answers_are_wrong_and_counted(tmp_path):
    path = write(tmp_path / "p.jsonl", {"id": "r1", "text": "1"}, {"id": "r2", "text": ""})
    result = score_given(make_task("gqa", [record(1), record(2)]), path).result
    assert result["value"] == 50.0
    assert "1 answers are empty, and count as wrong: 'r2'" in result["notes"]


def test_rows_are_completed_from_their_records(tmp_path):
    task = make_task("gqa", [record(1)])
    ((row,), notes) = complete(task, tmp_path, [Prediction("r1", text="One!")], task.records)
    assert (row.prompt, row.normalised, row.answers) == ("how how how", "1", ("1",))
    assert notes == []


def test_scores_alone_are_an_answer_only_where_candidates_are_known(tmp_path):
    task = make_task("gqa", [record(1)])
    with pytest.raises(MetricError, match="1 rows have scores, but neither text .*exact_match|gqa"):
        complete(task, tmp_path, [Prediction("r1", scores=(0.1, 0.2))], task.records)
    ranked = [Prediction("r1", scores=(0.1, 0.2), candidates=("0", "1"))]
    assert complete(task, tmp_path, ranked, task.records)[0][0].text == "1"
    task = make_task("iconqa", [record(1, choices=("a", "b"), correct=1)])
    assert (
        complete(task, tmp_path, [Prediction("r1", scores=(0.1, 0.2))], task.records)[0][0].text
        == "b"
    )


def test_published_answers_give_their_published_headline(shared, tmp_path, capsys):
    """LLaVA-1.5-13B on TextVQA: 61.25, with the two files of the VQA tools and no words of OCR."""
    folder = shared / "data" / "vqa" / "textvqa"
    given = folder / "llava-v1.5-13b_val_results_vqa_format.json"
    words = {"datasets": "textvqa", "data": folder, "out": tmp_path, "predictions": given}
    assert evaluate.main([f"--{name}={value}" for name, value in words.items()]) == 0
    assert (
        "textvqa: vqa_accuracy_evalai 61.25 (5000 records, standard error 0.66)"
        in capsys.readouterr().out
    )
    result = json.loads((tmp_path / "results.json").read_text())["datasets"]["textvqa"]
    assert round(result["value"], 2) == 61.25
    assert {name: round(value, 2) for name, value in result["values"].items()} == {
        **{"vqa_accuracy_evalai": 61.25, "vqa_accuracy": 49.09, "vqa_accuracy_lavis": 59.18}
    }
    with pytest.raises(ValueError, match="no records of textvqa"):
        words["checkpoint"] = words.pop("predictions")  # to be asked, the words are needed
        open_tasks(Settings.of(**words), "t5")
