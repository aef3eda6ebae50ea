import json

import numpy as np
import pytest
from PIL import Image

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation import families
from jax_instructblip.inference.pipeline import Answer
from jax_instructblip.models.variants import Variant
from tests.micro import micro


class Parrot:
    """Answers with the brightness of the first frame: enough to see what it was shown."""

    def __init__(self):
        self.variant: Variant = micro("t5")
        self.text = self
        self.calls = []

    def prompt(self, text):
        if "<image>" in text:
            raise ValueError("the text contains <image>")
        return {"tokens": text.split()}

    def generate(self, images, prompts, max_new_tokens, batch_size):
        assert len(images) == len(prompts)
        assert len({len(frames) for frames in images}) == 1
        self.calls.append((len(images), max_new_tokens, batch_size))
        shapes = {frame.shape for frames in images for frame in frames}
        assert shapes == {(28, 28, 3)}
        return [Answer(str(int(frames[0].max())), (1,), -0.5) for frames in images]


def plain(value, frames=1):
    return tuple(Image.new("RGB", (9, 7), (value,) * 3) for _ in range(frames))


def record(value, answers=None, task="", **fields):
    answers = (str(value),) if answers is None else answers
    given = dict(id=f"r{value}", images=plain(value), prompt="how bright?") | fields
    return Record(answers=answers, task=task, **given)


def test_answers_in_order_whatever_the_frames():
    records = [record(10), record(20, images=plain(20, 3)), record(30), record(40)]
    parrot = Parrot()
    found = families.answer(parrot, records, batch_size=2, max_new_tokens=7)
    assert [each.text for each in found] == ["10", "20", "30", "40"]
    assert all(each.correct and each.task == "all" and each.logprob == -0.5 for each in found)
    assert parrot.calls == [(3, 7, 2), (1, 7, 2)]


def test_images_are_read_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(families, "CHUNK_BATCHES", 2)
    parrot = Parrot()
    families.answer(parrot, [record(value) for value in range(11)], batch_size=2)
    assert [count for count, _, _ in parrot.calls] == [4, 4, 3]


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        families.answer(Parrot(), [record(1)], batch_size=0)


def test_blind_shows_black():
    found = families.answer(Parrot(), [record(10), record(0)], blind=True)
    assert [each.text for each in found] == ["0", "0"]
    assert [each.correct for each in found] == [False, True]


def test_what_cannot_be_asked_is_wrong_and_says_why():
    records = [
        record(1, images=(b"no image",)),
        record(2),
        record(3, prompt="an <image>"),
        record(4, answers=()),
        record(5, prompt="how " * 3000),
    ]
    found = families.answer(Parrot(), records)
    assert [each.correct for each in found] == [False, True, False, False, False]
    assert "image of 8 bytes" in found[0].problem
    assert "<image>" in found[2].problem and "no answer" in found[3].problem
    assert found[4].problem == "the prompt has 3000 tokens, the model holds 2048: shorten it"
    assert found[1].problem == "" and found[0].text == ""


def predictions(*rows):
    return [
        families.Prediction(str(i), task, "?", "x", answers, 0.0, correct)
        for i, (task, answers, correct) in enumerate(rows)
    ]


def test_accuracies_are_by_family_and_families_count_alike():
    found = predictions(("b", ("x",), True), ("a", ("y",), False), ("b", ("x",), True))
    found += predictions(("b", ("z",), False), ("b", ("z",), False))
    assert families.accuracies(found) == {"a": 0.0, "b": 0.5}
    assert families.mean(families.accuracies(found)) == 0.25
    assert families.majority_accuracies(found) == {"a": 1.0, "b": 0.5}


def test_pick_takes_some_of_every_family():
    """Eight questions about each image, one of each family: every tenth would meet only four."""
    records = [record(index, task=f"family{index % 8}") for index in range(800)]
    chosen = families.pick(records, 80)
    assert len({each.id for each in chosen}) == 80
    assert {each.task for each in chosen} == {f"family{n}" for n in range(8)}
    assert chosen == families.pick(records, 80)
    assert [int(each.id[1:]) for each in chosen] == sorted(int(each.id[1:]) for each in chosen)
    assert families.pick(records, 0) == families.pick(records, 9999) == records
    with pytest.raises(ValueError, match="limit is -1"):
        families.pick(records, -1)


def test_predictions_are_written_as_json_lines(tmp_path):
    found = families.answer(Parrot(), [record(5, task="light"), record(6, answers=("sechs",))])
    families.write_predictions(tmp_path / "predictions" / "test.jsonl", found)
    lines = (tmp_path / "predictions" / "test.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["id"] == "r5" and first["task"] == "light" and first["correct"] is True
    assert json.loads(lines[1])["answers"] == ["sechs"]
    assert np.isclose(first["logprob"], -0.5)
