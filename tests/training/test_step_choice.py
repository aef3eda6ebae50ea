import json

import pytest

from jax_instructblip.training.step_choice import METRIC, choose_step


@pytest.fixture
def run(tmp_path):
    """`run({0: 0.9, 2: 0.5}, [2, 4])`: what was validated, and which checkpoints there are."""

    def make(measured, steps, name="run"):
        folder = tmp_path / name
        for step in steps:
            (folder / "checkpoints" / str(step)).mkdir(parents=True)
            (folder / "checkpoints" / str(step) / "meta.json").write_text("{}")
        lines = [{"step": step, "time": 1.0, "loss": 2.0} for step in (1, 2)]
        lines += [{"step": step, "time": 1.0, METRIC: value} for step, value in measured.items()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def test_the_newest_a_step_or_the_best(run):
    folder = run({0: 0.95, 2: 0.5, 4: 0.9, 6: 0.9, 8: 0.2}, [2, 4, 6, 8])
    chosen = lambda **how: choose_step(folder, **how)
    assert chosen()[0] == folder / "checkpoints" / "8"
    assert chosen(step=2) == (
        folder / "checkpoints" / "2",
        f"step 2 of {folder} (validation/score 0.5000)",
    )
    # Step 0 is the untouched model; of equals the later one.
    assert chosen(best=True) == (
        folder / "checkpoints" / "6",
        f"step 6 of {folder} (validation/score 0.9000)",
    )


def test_a_folder_that_is_no_run_is_handed_on(run, tmp_path):
    folder = run({}, [2])
    assert choose_step(tmp_path) == (tmp_path, "")
    step = folder / "checkpoints" / "2"
    assert choose_step(step) == (step, "")
    for path in (tmp_path, step):
        with pytest.raises(ValueError, match=f"{path} is no run"):
            choose_step(path, step=2)
        with pytest.raises(ValueError, match=f"{path} is no run"):
            choose_step(path, best=True)


def test_what_cannot_be_chosen_says_what_can(run, tmp_path):
    folder = run({2: 0.5, 4: 0.9, 6: float("nan")}, [2, 6])
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; it has those of step 2 \(0.5"):
        choose_step(folder, step=3)
    with pytest.raises(ValueError, match=r"is 4 \(validation/score 0.9000\), but its check") as e:
        choose_step(folder, best=True)
    assert "is gone; there are those of step 2 (0.5000), step 6: choose one" in str(e.value)
    with pytest.raises(ValueError, match="step is '2', expected a whole number"):
        choose_step(folder, step="2")
    with pytest.raises(ValueError, match="choose one of the two"):
        choose_step(folder, step=2, best=True)
    for measured in ({}, {0: 0.9}):
        plain = run(measured, [2, 6], name=f"plain{len(measured)}")
        with pytest.raises(ValueError, match="was never validated.*choose one of step 2, step 6"):
            choose_step(plain, best=True)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        choose_step(tmp_path / "empty", best=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint 'nowhere'"):
        choose_step("nowhere")
