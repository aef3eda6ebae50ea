import json
import shutil

import numpy as np
import pytest

from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics.dialogue_scores import (
    read_relevance,
    score_ndcg,
    score_ranks,
)
from jax_instructblip.evaluation.metrics.metric import MetricError, Response

JUDGED = "visdial_1.0_val_dense_annotations_crowdsourced.json"


@pytest.fixture(scope="module")
def dialogues(shared, tmp_path_factory):
    """Real rounds with made-up scores, and the file of judgements about them."""
    folder, raw = shared / "data" / "visdial", tmp_path_factory.mktemp("visdial")
    shutil.copy(folder / "visdial_1.0_val_crowdsourced.json", raw / "visdial_1.0_val.json")
    records = list(DATASETS["visual_dialog"].read(raw, "val"))
    rng = np.random.default_rng(0)
    responses = [Response(record.id, "", rng.normal(size=100).tolist()) for record in records]
    return responses, records, folder / JUDGED


def test_ranks_of_real_dialogues(dialogues):
    responses, records, _ = dialogues
    assert len(records) == 970
    # Independently: count the candidates that are better than the right one.
    ranks = []
    for response, record in zip(responses, records, strict=True):
        right = response.scores[record.correct]
        ranks.append(1 + sum(score > right for score in response.scores))
    found = score_ranks(responses, records)
    assert found.samples["mean_rank"] == tuple(ranks)
    assert found.values == pytest.approx(
        {
            "mrr": sum(1 / rank for rank in ranks) / 970,
            **{f"r@{k}": sum(rank <= k for rank in ranks) / 970 for k in (1, 5, 10)},
            "mean_rank": sum(ranks) / 970,
        },
        abs=1e-12,
    )
    assert 40 < found.values["mean_rank"] < 60  # the scores are noise


def test_ndcg_of_real_dialogues(dialogues):
    responses, records, path = dialogues
    by_id = {response.id: list(response.scores) for response in responses}
    expected = []
    for row in json.loads(path.read_text()):
        gains = row["gt_relevance"]
        scores = by_id[f"{row['image_id']}:{row['round_id']}"]
        k = sum(gain != 0 for gain in gains)
        ranked = sorted(zip(scores, gains, strict=True), reverse=True)
        dcg = sum(gain / np.log2(i + 2) for i, (_, gain) in enumerate(ranked[:k]))
        ideal = sum(g / np.log2(i + 2) for i, g in enumerate(sorted(gains, reverse=True)[:k]))
        expected.append(dcg / ideal)
    relevance = read_relevance(path)
    found = score_ndcg(responses, records, relevance)
    assert len(found.samples["ndcg"]) == 97
    assert sorted(found.samples["ndcg"]) == pytest.approx(sorted(expected), abs=1e-12)
    assert found.values["ndcg"] == pytest.approx(np.mean(expected), abs=1e-12)
    best = [Response(name, "", gains) for name, gains in relevance.items()]
    judged = [record for record in records if record.id in relevance]
    assert score_ndcg(best, judged, relevance).values == {"ndcg": 1.0}


def record(name="1", correct=1):
    choices = ("yes", "no", "maybe")
    return Record(name, ("a.jpg",), "Is it?", ("no",), choices=choices, correct=correct)


@pytest.mark.parametrize(
    ("scores", "rank"), [((0, 1, 2), 2), ((0, 2, 1), 1), ((1, 1, 1), 2), ((1, 0, 0), 2), ((), 3)]
)
def test_equal_scores_stay_in_order_and_silence_comes_last(scores, rank):
    assert score_ranks([Response("1", "", scores)], [record()]).values["mean_rank"] == rank


def test_equal_scores_of_a_hundred_stay_in_order():
    choices = tuple(map(str, range(100)))
    scores = np.random.default_rng(0).integers(3, size=100).astype(float)
    records = [
        Record(choice, ("a.jpg",), "Is it?", (choice,), choices=choices, correct=int(choice))
        for choice in choices
    ]
    responses = [Response(choice, "", scores) for choice in choices]
    assert score_ranks(responses, records).samples["mean_rank"] == tuple(
        1 + (scores > scores[place]).sum() + (scores[:place] == scores[place]).sum()
        for place in range(100)
    )


def test_generated_answers_have_no_rank():
    with pytest.raises(MetricError, match="'1' was generated; MRR needs scores"):
        score_ranks([Response("1", "no")], [record()])


@pytest.mark.parametrize(
    ("relevance", "message"),
    [
        ({"2": [1, 0, 0]}, "none of 1 records was judged"),
        ({"1": [1, 0]}, "'1' has 3 scores and 2 judgements"),
        ({"1": [0, 0, 0]}, "0 of them above 0"),
    ],
)
def test_ndcg_is_refused(relevance, message):
    with pytest.raises(MetricError, match=message):
        score_ndcg([Response("1", "", (0, 1, 2))], [record()], relevance)


def test_judgements_are_checked(tmp_path):
    path = tmp_path / "dense.json"
    path.write_text(json.dumps([{"image_id": 7, "round_id": 3, "relevance": [0, 0.5]}]))
    assert read_relevance(path) == {"7:3": [0.0, 0.5]}
    path.write_text(json.dumps([{"image_id": 7, "round_id": 3}]))
    with pytest.raises(AnnotationError, match="row 0: no field 'relevance'"):
        read_relevance(path)
