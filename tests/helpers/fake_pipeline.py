"""Models that answer at once, and records to ask them about."""

import numpy as np
from PIL import Image

from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.protocol import BENCHMARKS
from jax_instructblip.evaluation.task import Task
from jax_instructblip.inference.pipeline import Answer
from tests.helpers.tiny import tiny_variant


class Text:
    """A token a word, of which the Q-Former reads eight; words with `<` are refused."""

    input_format = InputFormat()

    def __init__(self, variant):
        self.variant = variant

    def prompt(self, prompt, images=1):
        if "<" in prompt:
            raise ValueError(f"{prompt!r} has a <")
        words = np.arange(len(prompt.split()), dtype=np.int32)
        cut = np.array([len(words) > 8, 0, 0])
        return {"tokens": words, "qformer_tokens": words[-8:], "truncated": cut}

    def candidate(self, answer):
        return np.array([*(len(word) for word in answer.split()), 1], np.int32)


class FakePipeline:
    """Answers with the brightness of the first frame; ranks by how near candidates come to it.

    A question without an image is answered as if it had a black one.
    """

    mesh, silent, source = None, True, None

    def __init__(self, kind="t5", batch_shards=1):
        self.variant, self.batch_shards = tiny_variant(kind), batch_shards
        self.text, self.calls = Text(self.variant), []

    def answer(self, questions, config, batch_size):
        self._check(questions, batch_size, config)
        values = [_brightness(each) for each in questions]
        return [Answer(str(value), (1,), -0.5) for value in values]

    def rank_tokens(self, questions, lists, *, batch_size, pad_to, **settings):
        self._check(questions, batch_size, settings)
        lists = lists if len(lists) > 1 else lists * len(questions)
        scores = np.full((len(questions), max(map(len, lists))), -np.inf, np.float32)
        for row, (question, ids) in enumerate(zip(questions, lists, strict=True)):
            value = _brightness(question)
            scores[row, : len(ids)] = [-abs(value - (sum(each) - 1)) / 7 for each in ids]
        return scores

    def _check(self, questions, batch_size, settings):
        assert len(questions) % batch_size == 0
        assert len({len(each.frames) for each in questions}) == 1
        assert all(len(each.example["tokens"]) == len(each.prompt.split()) for each in questions)
        self.calls.append(([each.prompt for each in questions], batch_size, settings))


def _brightness(question):
    return int(question.frames[0].max()) if len(question.frames) else 0


def record(value, words=3, **fields):
    given = {
        "id": f"r{value}",
        "images": (Image.new("RGB", (9, 7), (value,) * 3),),
        "prompt": " ".join(["how"] * words),
        "answers": (str(value),),
    }
    return Record(**given | fields)


def make_task(name, records, candidates=(), **overrides):
    protocol = BENCHMARKS[name].override({"prompt": "{question}", **overrides})
    return Task(protocol, "test", records, "digest", protocol.settings(), candidates)
