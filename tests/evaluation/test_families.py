import pytest

from jax_instructblip.evaluation import families, suite
from jax_instructblip.evaluation.metrics.exact_match import score_families
from jax_instructblip.evaluation.metrics.metric import Response
from jax_instructblip.evaluation.predictions import read_rows
from jax_instructblip.inference.generation_config import GenerationConfig
from tests.helpers.fake_pipeline import FakePipeline, record

MODEL = {"checkpoint": "a fake", "weights": "green", "dtype": "float32"}
CONFIG = GenerationConfig(max_new_tokens=7)


def run(out, records, blip=None, limit=0, **more):
    said = []
    task = families.family_task("test", records, CONFIG, limit=limit)
    given = {"model": MODEL, "size": 2, "say": said.append, "replace": True, **more}
    finished = suite.run(blip or FakePipeline(), [task], out, limit=limit, **given)
    suite.write(out, finished, MODEL)
    return finished[0], "\n".join(said)


def test_families_are_asked_as_they_are_and_count_alike(tmp_path):
    records = [record(n, task="even" if n % 2 == 0 else "odd") for n in range(1, 6)]
    records[0] = record(1, task="odd", answers=("9",))
    blip = FakePipeline()
    finished, said = run(tmp_path, records, blip)
    assert blip.calls[0][0] == ["how how how"] * 2 and blip.calls[0][2] == CONFIG
    assert [row.text for row in finished.rows] == list("12345")
    assert [row.score for row in finished.rows] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert [row.task for row in finished.rows] == ["odd", "even", "odd", "even", "odd"]
    result = finished.result
    assert result["families"] == {"even": 2, "odd": 3}
    values = {"accuracy": 250 / 3, "accuracy/even": 100.0, "accuracy/odd": 200 / 3}
    assert result["values"] == {name: pytest.approx(each) for name, each in values.items()}
    assert result["value"] == result["values"]["accuracy"] and result["metric"] == "accuracy"
    assert result["baselines"] == {
        "majority": {"accuracy": pytest.approx(125 / 3)}
        | {"accuracy/even": 50.0, "accuracy/odd": pytest.approx(100 / 3)}
    }
    assert "even                          2    100.0%     50.0%" in said
    assert read_rows(tmp_path / "predictions" / "test.jsonl") == finished.rows


def test_baselines_answer_the_same_questions(tmp_path):
    class Other(FakePipeline):
        def answer(self, questions, config, batch_size):
            return super().answer(questions, config, batch_size)[::-1]

    blip, before = FakePipeline(), Other()
    baselines = [
        families.Baseline("blind", blip, "green", black=True),
        families.Baseline("before", before, "red"),
    ]
    records = [record(n) for n in range(4)]
    finished, said = run(tmp_path, records, blip, baselines=baselines)
    baselines_found = finished.result["baselines"]
    assert {name: each["accuracy"] for name, each in baselines_found.items()} == {
        **{"majority": 25.0, "blind": 25.0, "before": 0.0}
    }
    assert [row.text for row in read_rows(tmp_path / "baselines" / "test.blind.jsonl")] == ["0"] * 4
    assert "black images" in said and "blind" in said and "before" in said
    again, _ = run(tmp_path, records, FakePipeline(), baselines=baselines)
    assert again.result == finished.result and len(blip.calls) == 4  # nothing is asked twice


def test_answers_of_other_weights_are_replaced(tmp_path):
    run(tmp_path, [record(n) for n in range(4)])
    other = FakePipeline()
    run(tmp_path, [record(n) for n in range(4)], other, model=MODEL | {"weights": "red"})
    assert len(other.calls) > 0


def test_what_cannot_be_asked_is_wrong_and_says_why(tmp_path):
    records = [
        record(1, images=(b"no image",)),
        record(2),
        record(3, prompt="an <image>"),
        record(5, words=3000),
    ]
    finished, said = run(tmp_path, records)
    assert [row.score for row in finished.rows] == [0.0, 1.0, 0.0, 0.0]
    assert "image of 8 bytes" in finished.rows[0].problem
    assert (
        finished.rows[3].problem == "the prompt has 3000 tokens, the model holds 2048: shorten it"
    )
    assert "could not be asked: r1: " in said and finished.result["value"] == 25.0


def test_accuracies_are_by_family():
    truth = [("b", ("x",)), ("a", ("y",)), ("b", ("x",)), ("b", ("z",)), ("b", ("z", "w"))]
    records = [record(n, task=task, answers=answers) for n, (task, answers) in enumerate(truth)]
    scores = score_families([Response(each.id, "X ") for each in records], records)
    assert scores.values == {"accuracy": 0.25, "accuracy/a": 0.0, "accuracy/b": 0.5}
    assert scores.samples["accuracy"] == (1.0, 0.0, 1.0, 0.0, 0.0)
    assert scores.standard_errors() == {"accuracy/b": pytest.approx((1 / 12) ** 0.5)}
    assert families.majority(records)["accuracy/b"] == 0.5


def test_some_of_every_family_are_taken():
    """Eight questions about each image, one of each family: every tenth would meet only four."""
    records = [record(5, id=f"r{n}", task=f"family{n % 8}") for n in range(800)]
    task = families.family_task("test", records, CONFIG, limit=80)
    chosen = [task.without_images(number) for number in range(len(task.records))]
    assert len({each.id for each in chosen}) == 80
    assert {each.task for each in chosen} == {f"family{n}" for n in range(8)}
    assert [int(each.id[1:]) for each in chosen] == sorted(int(each.id[1:]) for each in chosen)
    with pytest.raises(ValueError, match="limit is -1"):
        families.family_task("test", records, CONFIG, limit=-1)


def test_files_of_images_belong_to_the_content(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    records = [record(1, images=(str(path),))]
    first = families.content_digest(records, "x")
    assert first == families.content_digest(records, "x") != families.content_digest(records, "y")
    path.write_bytes(b"other")
    assert families.content_digest(records, "x") != first
