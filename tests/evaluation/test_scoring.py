import dataclasses

import pytest

from jax_instructblip.evaluation.metrics import caption_scores
from jax_instructblip.evaluation.metrics.metric import MetricError, Scores
from jax_instructblip.evaluation.predictions import Prediction
from jax_instructblip.evaluation.scoring import HIDDEN, score, summarise
from tests.helpers.fake_pipeline import make_task, record


def result(task, rows, records, model="", cut=0):
    rows, scores, reason = score(task, rows, records)
    return rows, summarise(task, rows, scores, reason, {}, cut=cut, model=model)


def test_values_are_in_percent_and_every_row_has_its_score():
    records = [record(1, answers=("yes",)), record(2, answers=("two dogs",))]
    rows = [Prediction("r1", text="Yes"), Prediction("r2", text="a dog")]
    rows, found = result(make_task("gqa", records), rows, records, "instructblip-vicuna-7b", 1)
    assert [row.score for row in rows] == [1.0, 0.0]
    assert (found["metric"], found["value"]) == ("exact_match", 50.0)
    assert found["gap"] == pytest.approx(0.8) and found["paper"]["instructblip-vicuna-13b"] == 49.5
    assert found["count"] == 2 and found["prompts_cut_for_the_qformer"] == 1


def test_candidates_that_stand_for_a_choice_are_put_together():
    records = [record(n, choices=("yes", "no"), correct=n, answers=("x",)) for n in (0, 1)]
    words = ("yes", "true", "no", "false")
    # Together "yes" and "true" are likelier than "no", alone neither is.
    scores = ((-1.2, -1.2, -1.0, -9.0), (-9.0, -9.0, -1.0, -9.0))
    rows = [Prediction(f"r{n}", text="yes", candidates=words, scores=scores[n]) for n in (0, 1)]
    rows, found = result(make_task("hateful_memes", records), rows, records)
    assert found["values"] == {"auroc": 100.0, "accuracy": 100.0}
    assert [row.score for row in rows] == [1.0, 1.0]


def test_ranks_are_counts_and_not_percent():
    records = [record(0, choices=("a", "b", "c"), correct=2)]
    rows = [Prediction("r0", text="a", candidates=("a", "b", "c"), scores=(-1.0, -3.0, -2.0))]
    _, found = result(make_task("visual_dialog", records), rows, records)
    assert found["value"] == 50.0 and found["values"]["mean_rank"] == 2.0


def test_judgements_give_ndcg_beside_the_ranks():
    records = [record(0, choices=("a", "b", "c"), correct=2)]
    rows = [Prediction("r0", text="a", candidates=("a", "b", "c"), scores=(-1.0, -3.0, -2.0))]
    task = make_task("visual_dialog", records)
    task = dataclasses.replace(task, relevance={"r0": [0.0, 0.0, 1.0]})
    _, found = result(task, rows, records)
    assert found["metric"] == "mrr" and found["values"]["ndcg"] == 0.0
    task = dataclasses.replace(task, relevance={"r0": [1.0, 0.0, 0.0]})
    assert result(task, rows, records)[1]["values"]["ndcg"] == 100.0


def test_what_could_not_be_asked_counts_as_wrong_and_is_listed():
    records = [record(n, choices=("a", "b"), correct=0) for n in (0, 1)]
    rows = [Prediction("r0", text="a", scores=(-1.0, -2.0)), Prediction("r1", problem="no image")]
    _, found = result(make_task("iconqa", records), rows, records)
    assert found["value"] == 50.0 and found["problems"] == ["r1: no image"]


def test_hidden_answers_are_not_scored():
    records = [record(1, answers=()), record(2, answers=())]
    rows = [Prediction("r1", text="a"), Prediction("r2", text="b")]
    _, found = result(make_task("gqa", records), rows, records)
    assert found["unscored"] == HIDDEN and found["value"] is None and found["gap"] is None
    _, found = result(make_task("gqa", records), rows, [records[0], record(2, answers=("b",))])
    assert found["value"] == 100.0
    assert "1 of 2 records have no public answer" in found["notes"]


def test_what_cannot_be_scored_says_why(monkeypatch):
    records = [record(1, answers=("a cup", "cups"))]
    monkeypatch.setattr(caption_scores, "TOOLS", "pycocoevalcap_of_nobody")
    rows, found = result(make_task("nocaps", records), [Prediction("r1", text="a cup")], records)
    assert "pip install" in found["unscored"] and rows[0].score is None
    _, found = result(make_task("llava_detail", records), [Prediction("r1", text="a")], records)
    assert "no metric belongs to this dataset" in found["unscored"]


def test_what_a_metric_leaves_out_is_named(monkeypatch):
    def captions(responses, records):
        return Scores({"cider": 1.5}, {"cider": (1.5,)}, (), {"meteor": "it needs Java"})

    monkeypatch.setattr("jax_instructblip.evaluation.scoring.get_metric", lambda name: captions)
    records = [record(1)]
    _, found = result(make_task("nocaps", records), [Prediction("r1", text="a cup")], records)
    assert found["left_out"] == {"meteor": "it needs Java"} and found["value"] == 150.0


def test_other_errors_are_not_swallowed(monkeypatch):
    def broken(responses, records):
        raise TypeError("a defect")

    monkeypatch.setattr("jax_instructblip.evaluation.scoring.get_metric", lambda name: broken)
    with pytest.raises(TypeError):
        score(make_task("gqa", []), [Prediction("r1")], [record(1)])
    assert issubclass(MetricError, ValueError)
