import json

import pytest

from jax_instructblip.training.metrics import (
    ANSWERS,
    FILE,
    MetricsWriter,
    newest_step,
    read_answers,
    read_metrics,
)
from tests.helpers.interpreter import run_python


def steps(folder):
    return [line["step"] for line in read_metrics(folder)]


def test_lines_and_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 2.5, "tokens": 3.0})
    writer.write(2, {"validation/accuracy": 0.5})
    assert steps(tmp_path) == [1, 2]  # there before the writer is closed
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert lines[0]["loss"] == 2.5 and lines[0]["time"] > 1e9
    assert "loss" not in lines[1] and lines[1]["validation/accuracy"] == 0.5
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3, 4):
        writer.write(step, {"loss": float(step)})
    writer.close()
    writer = MetricsWriter(tmp_path, start=2)
    writer.write(3, {"loss": 30.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


def test_answers_of_a_step_stand_once(tmp_path):
    row = lambda text: {"id": "a", "prompt": "è?", "answers": ("red", "blue"), "text": text}
    writer = MetricsWriter(tmp_path)
    for step in (0, 2, 4):
        writer.write_answers(step, [row(str(step))])
    writer.close()
    with (tmp_path / ANSWERS).open("a") as file:
        file.write('{"step": 1, "id": "a", "text": 5}\n{"step": 1, "answers": "red"}\n')
        file.write('{"step": 4, "id"')
    MetricsWriter(tmp_path, start=2).close()  # taken up at step 2
    assert [(each["step"], each["text"]) for each in read_answers(tmp_path)] == [(0, "0"), (2, "2")]
    assert read_answers(tmp_path)[0]["prompt"] == "è?"
    MetricsWriter(tmp_path).close()  # started over
    assert read_answers(tmp_path) == []
    MetricsWriter(tmp_path / "other", silent=True).write_answers(1, [row("x")])
    assert not (tmp_path / "other").exists()


def test_a_last_line_cut_short_is_left_out(tmp_path):
    (tmp_path / FILE).write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert steps(tmp_path) == [1]
    MetricsWriter(tmp_path, start=1).close()
    assert (tmp_path / FILE).read_text() == '{"step": 1, "loss": 2}\n'


def test_damaged_lines_are_set_aside_and_counted(tmp_path):
    damaged = [
        b"\0\0\0\0",  # what a power cut leaves
        b"   ",
        b"\xff\xfe",
        b'{"step": 2, "lo',
        b"[" * 100_000,
        b"[1]",
        b'{"loss": 2.0}',
        b'{"step": 2.5, "loss": 2.0}',
        b'{"step": 2, "loss": "low"}',
    ]
    good = [b'{"step": 1, "loss": 2.5}', b'{"step": 3, "loss": 2.25}']
    (tmp_path / FILE).write_bytes(b"\n".join([good[0], *damaged, good[1], b'{"step": 4, "lo']))
    assert steps(tmp_path) == [1, 3] and newest_step(tmp_path) == 3
    writer = MetricsWriter(tmp_path, start=3)
    writer.close()
    assert writer.damaged == len(damaged) + 1
    assert (tmp_path / FILE).read_bytes() == b"".join(line + b"\n" for line in good)
    kept = (tmp_path / "metrics.damaged.jsonl").read_bytes()
    assert kept == b"".join(line + b"\n" for line in [*damaged, b'{"step": 4, "lo'])
    again = MetricsWriter(tmp_path, start=3)
    again.close()
    assert again.damaged == 0 and (tmp_path / "metrics.damaged.jsonl").read_bytes() == kept


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_board_is_opened_without_torch(tmp_path):
    """tensorboardX alone would import torch, which takes two seconds."""
    pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    found = run_python(f"""
        import sys
        from jax_instructblip.training.metrics import MetricsWriter
        MetricsWriter({str(tmp_path)!r}).close()
        print("tensorboardX" in sys.modules, "torch" in sys.modules)
    """)
    assert found.split() == ["True", "False"]
