"""Models that answer at once, and records to ask them about."""

import numpy as np
from PIL import Image

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.benchmarks import BENCHMARKS
from jax_instructblip.evaluation.task import Task, override
from jax_instructblip.inference.pipeline import Answer
from jax_instructblip.inference.presets import get_preset
from tests.micro import micro


class Text:
    """A token a word, of which the Q-Former reads eight; words with `<` are refused."""

    def __init__(self, variant):
        self.variant = variant

    def prompt(self, prompt):
        if "<" in prompt:
            raise ValueError(f"{prompt!r} has a <")
        words = np.arange(len(prompt.split()), dtype=np.int32)
        cut = np.array([len(words) > 8, 0, 0])
        return {"tokens": words, "qformer_tokens": words[-8:], "truncated": cut}

    def candidate(self, answer):
        return np.array([*(len(word) for word in answer.split()), 1], np.int32)


class Parrot:
    """Answers with the brightness of the first frame; ranks by how near candidates come to it."""

    mesh, silent = None, True

    def __init__(self, kind="t5", splits=1):
        self.variant, self.splits = micro(kind), splits
        self.text, self.calls = Text(self.variant), []

    def generate(self, images, prompts, batch_size, **settings):
        assert len(images) == len(prompts) and len(images) % batch_size == 0
        assert len({len(frames) for frames in images}) == 1
        self.calls.append((list(prompts), batch_size, settings))
        return [Answer(str(int(frames[0].max())), (1,), -0.5) for frames in images]

    def rank(self, images, prompts, candidates, batch_size, least, **settings):
        assert len(images) == len(prompts) and len(images) % batch_size == 0
        self.calls.append((list(prompts), batch_size, settings))
        lists = candidates if isinstance(candidates[0], list) else [candidates] * len(images)
        width = max(map(len, lists))
        scores = np.full((len(images), width), -np.inf, np.float32)
        for row, (frames, names) in enumerate(zip(images, lists, strict=True)):
            near = [-abs(int(frames[0].max()) - len(name)) / 7 for name in names]
            scores[row, : len(names)] = near
        return scores


def record(value, words=3, **fields):
    given = {
        "id": f"r{value}",
        "images": (Image.new("RGB", (9, 7), (value,) * 3),),
        "prompt": " ".join(["how"] * words),
        "answers": (str(value),),
    }
    return Record(**given | fields)


def make_task(name, records, candidates=(), **overrides):
    benchmark = BENCHMARKS[name]
    preset = override(get_preset(name), {"template": "{question}", **overrides}, "t5")
    return Task(benchmark, "test", records, "digest", preset, preset.settings("t5"), candidates)
