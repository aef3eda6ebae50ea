import json
import types

import pytest

from jax_instructblip.training import non_finite
from jax_instructblip.training.non_finite import NonFiniteGuard

FINE = {"loss": 1.0, "gradient_norm": 2.0}
NAN = {"loss": float("nan"), "gradient_norm": 2.0}
INFINITE = {"loss": 1.0, "gradient_norm": float("inf")}


def make(folder, skip=True, limit=3, steps=(4,)):
    checkpoints = types.SimpleNamespace(
        steps=lambda: list(steps), location=lambda step: f"run/{step}"
    )
    ids = lambda number: [f"record:{number}"]
    return NonFiniteGuard(folder, skip=skip, limit=limit, ids=ids, checkpoints=checkpoints)


def test_only_steps_in_a_row_end_a_run_that_skips_them(tmp_path):
    watch = make(tmp_path)
    for number, values in enumerate([NAN, INFINITE, FINE, NAN, INFINITE, FINE, NAN, NAN], 1):
        watch.check(number, values)
    with pytest.raises(ValueError, match="step 9: loss nan.* 3 in a row .* checkpoint: run/4;"):
        watch.check(9, NAN)
    noted = [json.loads(line) for line in (tmp_path / non_finite.FILE).read_text().splitlines()]
    assert [each["step"] for each in noted] == [1, 2, 4, 5, 7, 8, 9]
    assert noted[1] == {
        "step": 2,
        "samples": ["record:1"],
        "skipped": True,
        "loss": "1.0",
        "gradient_norm": "inf",
    }


def test_the_first_one_ends_a_run_that_does_not(tmp_path):
    watch = make(tmp_path, skip=False, steps=())
    watch.check(1, FINE)
    with pytest.raises(ValueError, match="step 2: .*samples: record:1. Newest checkpoint: none;"):
        watch.check(2, INFINITE)
    assert "record:1" in (tmp_path / non_finite.FILE).read_text()


def test_one_of_several_processes_writes_and_all_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(non_finite.jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match="nothing after it can be trusted"):
        make(tmp_path, skip=False).check(1, NAN)
    assert not (tmp_path / non_finite.FILE).exists()
