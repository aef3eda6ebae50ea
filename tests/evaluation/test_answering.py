import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from jax_instructblip.data.images import CROPS
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.evaluation import grouping
from jax_instructblip.evaluation.answering import Share, answer, count_left
from jax_instructblip.evaluation.grouping import loads, plan
from jax_instructblip.inference import batching as batching
from jax_instructblip.inference.pipeline import load
from jax_instructblip.models.released import get_variant
from tests.helpers.compile_counter import count_compiles
from tests.helpers.fake_pipeline import FakePipeline, make_task, record
from tests.helpers.tiny import write_base


def varied(count):
    """Questions of many lengths, with two to four candidates of many lengths."""
    return [
        record(
            n,
            1 + 5 * n % 8,
            choices=tuple(
                f"a{'red' * (k + n % 3)} {'no' * (7 * n * k % 9)}" for k in range(2 + n % 3)
            ),
            correct=0,
        )
        for n in range(1, count + 1)
    ]


def count_calls(monkeypatch):
    """Counts how often pictures and texts are prepared from now on, by name of the function."""
    made = dict.fromkeys(("decode", "resize", "prompt", "candidate"), 0)

    def counted(name, called):
        def call(*args, **rest):
            made[name] += 1
            return called(*args, **rest)

        return call

    monkeypatch.setattr(batching, "decode", counted("decode", batching.decode))
    monkeypatch.setitem(CROPS, "squash", counted("resize", CROPS["squash"]))
    for name in ("prompt", "candidate"):
        monkeypatch.setattr(TextProcessor, name, counted(name, getattr(TextProcessor, name)))
    return made


@pytest.mark.parametrize("name", ["gqa", "iconqa"])
def test_nothing_is_made_twice_or_compiled_after_the_first_load(tmp_path, name, monkeypatch):
    monkeypatch.setattr(grouping, "LOAD_UNITS", 1)
    blip = load(write_base(tmp_path / "base", "llama", **{"llm.max_positions": 512}))
    blip.silent = True
    task = make_task(name, varied(24), num_beams=1, max_new_tokens=3)
    made = count_calls(monkeypatch)
    questions = plan(task, blip.text, 1)
    rows, compiled, seen = [], [], set()
    planned = dict(made)
    with count_compiles() as seconds:

        def take(made):
            rows.extend(made)
            compiled.append(len(seconds))

        answer(blip, task, questions, size=1, take=take)
    order = loads(questions.units, 1, 1)
    assert len(order) == len(compiled) > len({each[0].group for each in order}) > 1
    for number, each in enumerate(order):
        new = compiled[number] - (compiled[number - 1] if number else 0)
        if each[0].group in seen:
            assert new == 0, f"load {number} of {each[0].group} compiled {new} programs"
        elif not seen:
            assert new > 0
        seen.add(each[0].group)
    assert sorted(row.id for row in rows) == sorted(each.id for each in questions.records)
    # Each picture is decoded and resized once, each text is tokenised once.
    texts = {each for record in questions.records for each in record.choices}
    tokenised = {"prompt": 24, "candidate": len(texts) if task.protocol.ranking else 0}
    assert planned == {"decode": 0, "resize": 0, **tokenised}
    assert made == {"decode": 24, "resize": 24, **tokenised}


def test_the_shares_of_processes_cover_all_questions():
    task = make_task("gqa", [record(n, 3 if n % 3 else 20) for n in range(30)])
    blip = FakePipeline(batch_shards=2)
    questions = plan(task, blip.text, 2)
    asked = []
    for index in range(3):
        answer(blip, task, questions, size=2, share=Share(index, 3), take=asked.extend)
    assert sorted(row.id for row in asked) == sorted(f"r{n}" for n in range(30))
    assert all(row.text == row.id[1:] for row in asked)


class Looking(FakePipeline):
    """Keeps the frame that it saw."""

    def answer(self, questions, config, batch_size):
        self.frame = questions[0].frames[0]
        return super().answer(questions, config, batch_size)


def test_the_middle_of_an_image_may_be_shown_and_photographs_be_left_as_they_lie():
    """Black but for a white band: above where it lies in the file, on the left when turned."""
    stored = np.zeros((300, 100, 3), np.uint8)
    stored[:90] = 255
    exif = Image.Exif()
    exif[0x0112] = 8
    file = io.BytesIO()
    Image.fromarray(stored).save(file, "PNG", exif=exif)
    task = make_task("gqa", [record(1, images=(file.getvalue(),))])
    seen = {}
    for crop, upright in itertools.product(("squash", "center"), (True, False)):
        shown = dataclasses.replace(task, crop=crop, upright=upright)
        blip = Looking()
        answer(blip, shown, plan(shown, blip.text, 1), size=1, take=[].extend)
        seen[crop, upright] = blip.frame
    assert seen["squash", False][0].min() > 200 and seen["squash", False][:, 0].min() == 0
    assert seen["squash", True][0].min() == 0 and seen["squash", True].max() == 255
    assert seen["center", True].max() == seen["center", False].max() == 0


def test_llava_is_asked_without_an_image_too():
    blip = FakePipeline()
    blip.variant = blip.text.variant = get_variant("llava-7b")
    task = make_task("gqa", [record(3), record(4, images=()), record(5)])
    rows = []
    answer(blip, task, plan(task, blip.text, 2), size=2, take=rows.extend)
    assert {row.id: (row.text, row.problem) for row in rows} == {
        **{"r3": ("3", ""), "r4": ("0", ""), "r5": ("5", "")},
    }


def test_what_is_done_is_not_asked_again():
    task = make_task("gqa", [record(n) for n in range(10)])
    blip = FakePipeline()
    questions = plan(task, blip.text, 2)
    done = {f"r{n}" for n in range(10) if n not in (4, 9)}
    rows = []
    answer(blip, task, questions, size=2, done=done, take=rows.extend)
    assert count_left(questions, done) == 2
    assert {row.id for row in rows} == {"r4", "r5", "r8", "r9"}  # whole units


def test_a_damaged_image_changes_no_other_answer():
    good = [record(n) for n in range(5)]
    bad = [*good[:2], record(2, images=(b"nothing",)), *good[3:]]
    blip, found = FakePipeline(), []
    for records in (good, bad):
        task, rows = make_task("gqa", records), []
        answer(blip, task, plan(task, blip.text, 2), size=2, take=rows.extend)
        found.append(rows)
    assert [row.text for row in found[1]] == ["0", "1", "", "3", "4"]
    assert "7 bytes" in found[1][2].problem
    assert [a for a, b in zip(*found, strict=True) if a != b] == [found[0][2]]
