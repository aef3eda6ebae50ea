"""`benchmarks.run`: the choice of rivals, and ratios of the times of alternating processes."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from benchmarks import rank_counts, ranking, run, sides, training
from benchmarks.ours import training_batch
from jax_instructblip.data import spec


def calls(*seconds):
    return [{"wall": s, "own": 2 * s, "others": 0.5, "value": [[1, 2]]} for s in seconds]


def test_a_rival_that_is_not_installed_is_left_out_by_name(monkeypatch):
    known = ("jax_instructblip", "transformers", "transformers_forward")
    there = lambda name: None if name == "keras_hub" else name
    monkeypatch.setattr(importlib.util, "find_spec", there)
    found = run.choose_sides(known, ["transformers", "keras_hub"])
    assert found == (list(known), ["keras_hub is not installed"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (chosen, reasons) = run.choose_sides(known, ["keras_hub"])
    assert chosen == ["jax_instructblip"] and "keras_hub has no InstructBLIP" in reasons[0]
    with pytest.raises(ValueError, match="--against kerashub: expected some of transformers"):
        run.choose_sides(known, ["kerashub"])


def test_ratios_are_of_one_unit_of_work_and_of_neighbouring_calls():
    """The second pair of calls fell into a busy time of the machine, which cancels out."""
    ours = sides.summary(calls(1.0, 10.0, 1.1), {"work": 100})
    theirs = sides.summary(calls(2.0, 20.0, 2.4), {"work": 10})
    assert (ours["seconds"], ours["per_second"]) == (1.1, 90.91)
    memory = {"peak_gigabytes": 2.0}, {"peak_gigabytes": 4.0}
    pair = {"jax_instructblip": ours | memory[0], "transformers": theirs | memory[1]}
    (ratio,) = sides.ratios(pair)["ratios"].values()
    assert ratio["times_as_fast"] == 20.0  # twice the seconds for a tenth of the work
    assert ratio["times_as_fast_by_processor_seconds"] == pytest.approx(10 * 2.4 / 1.1, abs=1e-3)
    assert (ratio["memory"], ratio["same_answers"]) == (0.5, "1 of 1")
    row = {"case": {"variant": "a", "batch": 3}, "sides": pair, "ratios": {"transformers": ratio}}
    for side in pair.values():
        side["unit"] = "samples"
    assert run.table([row])[-1].startswith("| a batch 3 (transformers) | 90.91 samples/s | ")


def test_values_of_both_sides_are_compared():
    assert sides.agreement([[1, 2], [3]], [[1, 2], [4]]) == {"same_answers": "1 of 2"}
    assert sides.agreement([1.0, 2.0], [1.0, 2.5]) == {"largest_difference": 0.5}
    assert sides.agreement(1.0, 1.25) == {"largest_difference": 0.25}
    assert sides.agreement([1.0], [1.0, 2.0]) == sides.agreement(None, None) == {}


def test_both_sides_train_on_the_same_samples():
    """Ours has the ids of the samples that transformers pads, in packed rows."""
    theirs = pytest.importorskip("benchmarks.theirs", reason="needs torch and transformers")
    import torch

    case = {"variant": "middle-vicuna", "batch": 16}
    variant, samples = training.samples_of(case)
    batch = training_batch(variant, samples, 8)
    spec.check(batch, variant)
    given = theirs.training_inputs(variant, samples, torch.float32)
    real = given["attention_mask"].bool() & (given["input_ids"] != theirs.image_id(variant))
    ids = sorted(given["input_ids"][real].tolist())
    assert sorted(batch["tokens"][(batch["slots"] < 0) & (batch["segments"] > 0)].tolist()) == ids
    targets = sorted(given["labels"][given["labels"] >= 0].tolist())
    assert sorted(batch["targets"][batch["targets"] >= 0].tolist()) == targets
    assert batch["segments"].size < 0.7 * given["input_ids"].numel()
    assert given["input_ids"].shape[1] == max(len(s.prompt) + len(s.answer) for s in samples) + 32


def test_a_side_that_fails_tells_why(tmp_path):
    case = {"suite": "nothing", "device": "cpu", "work": str(tmp_path)}
    with pytest.raises(RuntimeError, match="No module named 'benchmarks.nothing'"):
        sides.compare(case, ["jax_instructblip"], repeats=1, warm_up=0)


def test_cases_in_the_results_file_are_not_measured_again(tmp_path, monkeypatch, capsys):
    measured = []
    row = {"sides": {}, "ratios": {}}
    monkeypatch.setattr(
        run,
        "_measured",
        lambda case, *_: measured.append(case) or {"case": sides.shown(case), **row},
    )
    monkeypatch.setattr(run, "draw", lambda *_: None)
    out = tmp_path / "out.json"
    words = ["run", "--suite", "train", "--sizes", "tiny", "--dtype", "bfloat16", "--resume"]
    words += ["--against", "keras_hub", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    assert run.main() == run.main() == 0
    assert [case["variant"] for case in measured] == ["tiny-t5", "tiny-vicuna"]
    assert "skipped: keras_hub" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert [each["case"]["variant"] for each in document["results"]] == ["tiny-t5", "tiny-vicuna"]
    assert not any("work" in each["case"] for each in document["results"])
    monkeypatch.setattr(sys, "argv", [*words, "--only", "batch=5"])
    with pytest.raises(ValueError, match="--only batch=5: no case"):
        run.main()


def test_the_batch_has_the_median_longest_sample():
    case = {"variant": "middle-t5", "batch": 32}
    lengths = [len(each.prompt) + len(each.answer) for each in training.samples_of(case)[1]]
    assert 60 < max(lengths) < 400 and np.median(lengths) < 0.5 * max(lengths)


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-vicuna"])
def test_the_products_of_the_rival_are_those_that_torch_counts(name):
    """Torch counts no products inside attention on a CPU, ours does: a few in a hundred."""
    theirs = pytest.importorskip("benchmarks.theirs", reason="needs torch and transformers")
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    variant = rank_counts.variant_of(name)
    candidates = ranking.draw_candidates(variant, 8)
    found = rank_counts.counts(variant, candidates)
    assert found["needed"] <= found["ours"] == sum(found["of_ours"].values())
    model = theirs.load({"variant": name, "device": "cpu", "dtype": "float32"})
    asked = rank_counts.Questions.draw(variant, 1, rank_counts.Lengths())
    given = theirs.question_inputs(variant, asked, torch.float32)
    longest = max(map(len, candidates))
    targets = torch.tensor([[*ids, *[-100] * (longest - len(ids))] for ids in candidates])
    for way, score in (
        ("behind_image", ranking._behind_one_image),
        ("forward", ranking._forward),
    ):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            score(model, variant, given, targets, 8)
        assert counter.get_total_flops() <= found[way] <= 1.15 * counter.get_total_flops(), way
