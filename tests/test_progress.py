import re

import pytest

from jax_instructblip import progress
from jax_instructblip.progress import Progress, duration


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    Clock.now = 100.0
    return Clock


def test_short_work_prints_nothing(clock, capsys):
    with Progress(10, "reading") as line:
        for _ in range(10):
            clock.now += 0.19
            line.update()
    assert capsys.readouterr().err == ""


def test_log_gets_a_line_every_ten_seconds_with_rate_and_time_left(clock, capsys):
    with Progress(100, "reading", "files") as line:
        for _ in range(25):
            clock.now += 1.0
            line.update(2, note="loss 3.2")
    assert capsys.readouterr().err.splitlines() == [
        "reading: 4/100 files, 2.0/s, 48s left, loss 3.2",
        "reading: 24/100 files, 2.0/s, 38s left, loss 3.2",
        "reading: 44/100 files, 2.0/s, 28s left, loss 3.2",
        "reading: 50/100 files, 2.0/s, took 25s, loss 3.2",
    ]


def test_the_rate_is_of_the_last_half_minute(clock, capsys):
    """A program is compiled for a minute before the first step, and later steps are faster."""
    with Progress(1000, "tuning", "steps", done=400, compiles=True) as line:
        clock.now += 60.0
        line.update()
        for _ in range(20):
            clock.now += 1.0
            line.update()
        for _ in range(120):
            clock.now += 0.5
            line.update()
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "tuning: 401/1000 steps"  # nothing is known of the others
    assert printed[1] == "tuning: 411/1000 steps, 1.0/s, 9m49s left"
    assert printed[4] == "tuning: 461/1000 steps, 1.7/s, 5m23s left"
    assert printed[5] == "tuning: 481/1000 steps, 2.0/s, 4m20s left"
    assert printed[-1] == "tuning: 541/1000 steps, 1.0/s, took 2m20s"


def test_many_updates_keep_few_marks(clock):
    line = Progress(None, "reading")
    for _ in range(10_000):
        clock.now += 0.01
        line.update()
    assert len(line._marks) <= 2 + progress.RATE_SECONDS / progress.TTY_SECONDS * 1.1


def test_terminal_line_is_drawn_in_place(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(None, "reading") as line:
        for _ in range(50):
            clock.now += 0.1
            line.update()
    printed = capsys.readouterr().err
    assert printed.endswith("\x1b[K\n") and printed.count("\n") == 1
    assert len(re.findall("\r", printed)) > 10
    assert "reading: 50 items, 10.0/s, took 5s" in printed


def test_slow_work_and_long_times(clock, capsys):
    line = Progress(3, "steps")
    clock.now += 90.0
    line.update()
    line.close()
    assert "1/3 items, 90.0s each, 3m00s left" in capsys.readouterr().err
    assert [duration(s) for s in (8.4, 200, 7500, 59.7)] == ["8s", "3m20s", "2h05m", "1m00s"]
