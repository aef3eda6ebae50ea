"""Real processes that work on one run, each with devices of its own, as the hosts of a pod do."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.training.metrics import read_metrics
from tests.helpers import kill_processes
from tests.helpers.ports import free_port
from tests.helpers.tiny import compile_cache, write_base, write_data

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
STEPS = 50
LIMIT = 300  # seconds until a process that hangs is ended
TOLERANCE = 1e-5  # of losses near 3, in float32, summed in another order


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with compile_cache(folder / "compiled"):
        yield write_base(folder / "base"), write_data(folder / "data")


def words(files, workdir, **fields):
    base, data = files
    values = {
        "workdir": workdir,
        "model.checkpoint": base,
        "model.dtype": "float32",
        "model.frozen_dtype": "float32",
        "data.sources.mine.path": data,
        "data.batch_size": 8,
        "data.threads": 1,
        "text.qformer_limit": 12,
        "text.prompt_limit": 12,
        "text.answer_limit": 6,
        "train.steps": STEPS,
        "train.log_every": 1,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 1,
        "checkpoints.every": 20,
        "validation.path": "",
    }
    overrides = [f"--config.{name}={value}" for name, value in (values | fields).items()]
    return ["train", "--config", "configs/custom_jsonl.py", *overrides]


def start(count, devices, arguments, here=None, program=("jax_instructblip",)):
    """The processes of a run, or the first `here` of them."""
    port = free_port()
    started = []
    for index in range(count if here is None else here):
        place = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        environment = {
            **os.environ,
            **(place if count > 1 else {}),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *program, *arguments],
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return started


def ended(started):
    """The output of each process and its exit status."""
    try:
        return [(process.communicate(timeout=LIMIT)[0], process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


def wait_for_step(started, workdir, step):
    """Returns when that many lines of metrics are there."""
    deadline = time.monotonic() + LIMIT
    while not workdir.is_dir() or len(read_metrics(workdir)) < step:
        if time.monotonic() > deadline or any(each.poll() is not None for each in started):
            said = "\n".join(said for said, _ in ended(started))
            raise AssertionError(f"ended, or slow, before step {step}:\n{said}")
        time.sleep(0.02)


def run(files, workdir, count, devices, **fields):
    """The losses of a run, step by step, and what process 0 said."""
    found = ended(start(count, devices, words(files, workdir, **fields)))
    assert [code for _, code in found] == [0] * count, "\n".join(said for said, _ in found)
    return losses(workdir), found[0][0]


def losses(workdir):
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([[line["loss"], line["tokens"]] for line in lines])


def final(workdir, step=STEPS):
    folder = workdir / "checkpoints" / str(step) / "trainable"
    return checkpoint.flatten(checkpoint.read_tree(folder))


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    return run(files, workdir, 1, 4)[0], final(workdir)


@pytest.fixture(scope="module")
def together(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("together") / "run"
    return run(files, workdir, 2, 2)[0], final(workdir)


@pytest.mark.full
def test_packed_rows_on_two_processes_make_the_curve_of_plain_ones(files, tmp_path):
    """An image that cannot be read is replaced by the same sample everywhere."""
    base, data = files
    shutil.copytree(data.parent, tmp_path / "data")
    (tmp_path / "data" / "3.png").write_bytes(b"no image")
    given = base, tmp_path / "data" / data.name
    still = {"model.qformer_dropout": 0.0, "model.llm_dropout": 0.0, "train.steps": 12}
    plain, _ = run(given, tmp_path / "plain", 1, 4, **still)
    packed, _ = run(given, tmp_path / "packed", 2, 2, **still, **{"data.samples_per_row": 2})
    assert len(plain) == 12 and (plain[:, 1] == packed[:, 1]).all()
    assert np.abs(plain - packed).max() < TOLERANCE
    replaced = [line.get("replaced", 0) for line in read_metrics(tmp_path / "packed")]
    assert sum(replaced) > 0


def test_two_processes_make_the_curve_of_one(alone, together):
    np.testing.assert_allclose(together[0], alone[0], rtol=0, atol=TOLERANCE)
    assert together[0][0, 0] > together[0][-1, 0]
    for path, leaf in alone[1].items():
        # No softmax depends on a key's bias: its gradient is rounding alone, which Adam scales up.
        if not path.endswith("key/bias"):
            np.testing.assert_allclose(together[1][path], leaf, rtol=0, atol=100 * TOLERANCE)


@pytest.mark.full
def test_split_weights_are_read_and_saved_in_parts(files, alone, tmp_path):
    split = {"mesh.data": 1, "mesh.fsdp": 2, "train.steps": 4, "checkpoints.every": 2}
    found, said = run(files, tmp_path / "run", 2, 1, **split)
    # The learning rate's schedule ends earlier: only the first steps are the same.
    np.testing.assert_allclose(found[:1], alone[0][:1], rtol=0, atol=TOLERANCE)
    read, whole = map(float, re.search(r"read ([\d.]+) of ([\d.]+) MB", said).groups())
    assert 0.3 < read / whole < 0.8
    ended_with = final(tmp_path / "run", 4)
    assert {path: leaf.shape for path, leaf in ended_with.items()} == {
        path: leaf.shape for path, leaf in alone[1].items()
    }
    newest = tmp_path / "run" / "checkpoints" / "4"
    manifest = checkpoint.read_manifest(newest / "trainable")
    counts = {path: len(entry["parts"]) for path, entry in manifest.items()}
    assert counts["qformer/queries"] == 1 and counts["qformer/projection/kernel"] == 2
    shutil.rmtree(newest)  # as if it had been killed there
    again, said = run(files, tmp_path / "run", 2, 1, **split)
    assert "at step 2 of 4" in said
    np.testing.assert_array_equal(again, found)
    for path, leaf in final(tmp_path / "run", 4).items():
        np.testing.assert_array_equal(leaf, ended_with[path], err_msg=path)


LARGE = {"llm.width": 512, "llm.heads": 8, "llm.mlp": 1536, "llm.layers": 6}


@pytest.mark.full
def test_a_trained_language_model_lies_in_parts_on_two_processes(tmp_path):
    """LLaVA's second stage, saved and resumed: each process reads, holds and writes its half."""
    base = write_base(tmp_path / "base", "llava", **LARGE, **{"projector.llm_width": 512})
    files = base, write_data(tmp_path / "data")
    fields = {
        **{"model.trainable": "('projector','llm')", "model.remat.llm": "full"},
        **{"optimizer.weight_decay": 0.0, "optimizer.clip_norm": 1.0, "data.augment": False},
        **{"train.steps": 4, "checkpoints.every": 2, "mesh.data": 1, "mesh.fsdp": 2},
    }
    program = ("tests.helpers.peak_memory",)

    def go(name, count):
        arguments = words(files, tmp_path / name, **fields)
        found = ended(start(count, 2 // count, arguments, program=program))
        assert [code for _, code in found] == [0] * count, "\n".join(said for said, _ in found)
        return found, [int(re.search(r"peak (\d+)", said)[1]) for said, _ in found]

    _, (one,) = go("alone", 1)
    found, peaks = go("run", 2)
    np.testing.assert_allclose(
        losses(tmp_path / "run"), losses(tmp_path / "alone"), rtol=0, atol=10 * TOLERANCE
    )
    read, whole = map(float, re.search(r"read ([\d.]+) of ([\d.]+) MB", found[0][0]).groups())
    assert 0.4 < read / whole < 0.6
    newest = tmp_path / "run" / "checkpoints" / "4"
    for part in ("trainable", "optimizer"):
        manifest = checkpoint.read_manifest(newest / part)
        large = [path for path in manifest if path.endswith("kernel")]
        assert len(large) > 6 and all(len(manifest[path]["parts"]) == 2 for path in large)
    state = 3 * 4 * sum(leaf.size for leaf in final(tmp_path / "run", 4).values())
    assert max(peaks) < one - 0.4 * state
    ended_with, curve = final(tmp_path / "run", 4), losses(tmp_path / "run")
    shutil.rmtree(newest)  # as if it had been killed there
    again, _ = go("run", 2)
    assert "at step 2 of 4" in again[0][0]
    np.testing.assert_array_equal(losses(tmp_path / "run"), curve)
    for path, leaf in final(tmp_path / "run", 4).items():
        np.testing.assert_array_equal(leaf, ended_with[path], err_msg=path)
    result = {
        "what": "LLaVA's second stage on 1 process of 2 devices, and on 2 of 1: weights, moments "
        "and checkpoints in two parts; saved, stopped and resumed",
        "command": "pytest -n0 -m full tests/parallel/test_processes.py -k language_model",
        "jax": jax.__version__,
        "bytes_of_weights_and_moments": state,
        "peak_bytes_of_one_process": one,
        "peak_bytes_of_each_of_two": peaks,
        "resumed_weights_equal_bit_for_bit": True,
    }
    (RESULTS / "llava_two_processes.json").write_text(json.dumps(result, indent=1) + "\n")


@pytest.mark.parametrize(
    ("count", "number"),
    [
        (2, signal.SIGINT),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.full),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.full),
    ],
)
def test_told_to_stop_all_save_the_same_step_and_go_on(
    files, alone, together, tmp_path, count, number
):
    workdir = tmp_path / "run"
    started = start(2, 2, words(files, workdir))
    wait_for_step(started, workdir, 5)
    started[1].send_signal(number)  # SIGINT becomes SIGTERM there
    found = ended(started)
    assert [code for _, code in found] == [0, 0], "\n".join(said for said, _ in found)
    stopped = int(re.search(r"told to stop: saved step (\d+)", found[0][0])[1])
    assert 5 <= stopped < STEPS
    steps = sorted(int(name) for name in os.listdir(workdir / "checkpoints"))
    assert steps[-1] == stopped and len(losses(workdir)) == stopped
    curve, said = run(files, workdir, count, 4 // count)
    assert f"at step {stopped} of {STEPS}" in said
    if count == 2:  # the same processes: bit for bit
        np.testing.assert_array_equal(curve, together[0])
        for path, leaf in final(workdir).items():
            np.testing.assert_array_equal(leaf, together[1][path], err_msg=path)
    else:
        np.testing.assert_allclose(curve, alone[0], rtol=0, atol=TOLERANCE)


def test_an_absent_process_is_named_within_the_limit(files, tmp_path):
    arguments = [*words(files, tmp_path / "run"), "--wait_limit", "3"]
    began = time.monotonic()
    ((said, code),) = ended(start(2, 1, arguments, here=1))
    assert code == 1 and time.monotonic() - began < 60
    assert "1 of 2 processes are here, absent: 1" in said


@pytest.mark.full
def test_spoilt_steps_are_skipped_by_all_and_written_down_once(files, together, tmp_path):
    """Until they are too many in a row: then all end, with the same sentence."""
    workdir = tmp_path / "run"
    fields = {"train.non_finite": "skip", "train.non_finite_limit": 3}
    program = ("tests.helpers.inject_nan", "3,6,7,10,11,12")
    found = ended(start(2, 2, words(files, workdir, **fields), program=program))
    assert [code for _, code in found] == [1, 1]
    for said, _ in found:  # by itself, or told by the one that was first
        assert "step 12: loss nan" in said and "3 in a row" in said, said
    noted = [json.loads(line) for line in (workdir / "non_finite.jsonl").read_text().splitlines()]
    assert [each["step"] for each in noted] == [3, 6, 7, 10, 11, 12]
    assert all(len(each["samples"]) == 8 and each["skipped"] for each in noted)  # of all processes
    lines = {line["step"]: line for line in read_metrics(workdir)}
    assert [step for step in lines if lines[step]["skipped"]] == [3, 6, 7, 10, 11]
    for step in (1, 2):  # the steps behind them start from other weights
        assert lines[step]["loss"] == together[0][step - 1, 0]
    assert all(np.isfinite(lines[step]["loss"]) for step in (4, 5, 8, 9))


def survive(files, folder, moments, seed, unbroken, steps=STEPS):
    """Notes of a run of two processes of which one was killed at these moments."""
    arguments = words(files, folder / "run", **kill_processes.FIELDS, **{"train.steps": steps})
    again = lambda: start(2, 2, [*arguments, "--wait_limit", "60"])
    kills = kill_processes.RandomKills(again, ended, folder / "run", seed)
    notes = []
    for moment in moments:
        notes.append(kills.strike(moment))
        print(len(notes), notes[-1], flush=True)
    found = ended(again())
    assert [code for _, code in found] == [0, 0], "\n".join(said for said, _ in found)
    np.testing.assert_array_equal(losses(folder / "run"), unbroken[0])
    for path, leaf in final(folder / "run", steps).items():
        np.testing.assert_array_equal(leaf, unbroken[1][path], err_msg=path)
    return notes


@pytest.mark.full
def test_killed_between_and_during_saves_the_run_ends_as_if_unbroken(files, together, tmp_path):
    notes = survive(files, tmp_path, ["step", "save"], 1, together)
    assert notes[1]["a_save_was_going_on"]


@pytest.mark.full
def test_killed_twenty_times_the_run_ends_as_if_unbroken(files, tmp_path):
    seed, steps = int(os.environ.get("JAX_INSTRUCTBLIP_CHAOS", "0")), 120
    curve, _ = run(files, tmp_path / "unbroken", 2, 2, **{"train.steps": steps})
    draw = random.Random(seed)
    moments = [draw.choice(["start", "step", "step", "save", "save"]) for _ in range(20)]
    began = time.monotonic()
    notes = survive(
        files, tmp_path, moments, seed, (curve, final(tmp_path / "unbroken", steps)), steps
    )
    result = {
        "what": "2 gloo processes of 2 devices; one is killed (kill -9) 20 times; all start again",
        "command": "pytest -n0 -m full tests/parallel/test_processes.py -k twenty",
        "jax": jax.__version__,
        "seed": seed,
        "steps": steps,
        "steps_between_checkpoints": kill_processes.EVERY,
        "final_parameters_equal_those_of_an_unbroken_run_bit_for_bit": True,
        "committed_steps_lost": 0,
        "unreadable_checkpoints": 0,
        "seconds": round(time.monotonic() - began),
        "kills": notes,
    }
    (RESULTS / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")


@pytest.mark.full
def test_four_processes_make_the_curve_of_one(files, alone, tmp_path):
    curve, _ = run(files, tmp_path / "run", 4, 1)
    np.testing.assert_allclose(curve, alone[0], rtol=0, atol=TOLERANCE)
    result = {
        "what": "4 gloo processes of 1 device against 1 process of 4, the same global batches",
        "steps": STEPS,
        "largest_difference_of_a_loss": float(np.abs(curve - alone[0])[:, 0].max()),
        "target_tokens_equal_at_every_step": bool((curve[:, 1] == alone[0][:, 1]).all()),
    }
    (RESULTS / "four_processes.json").write_text(json.dumps(result, indent=1) + "\n")


@pytest.mark.full
@pytest.mark.parametrize(("before", "after"), [(4, 1), (2, 4), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(files, alone, tmp_path, before, after):
    """Both runs have 4 devices, over which weights, moments and batches are split."""
    workdir, split = tmp_path / "run", {"mesh.data": 2, "mesh.fsdp": 2, "checkpoints.every": 10}
    processes = start(before, 4 // before, words(files, workdir, **split))
    wait_for_step(processes, workdir, 12)
    processes[0].send_signal(signal.SIGTERM)
    found = ended(processes)
    assert [code for _, code in found] == [0] * before, "\n".join(said for said, _ in found)
    curve, said = run(files, workdir, after, 4 // after, **split)
    assert "told to stop" in found[0][0] and re.search(r"resuming .* at step \d+ of", said)
    np.testing.assert_allclose(curve, alone[0], rtol=0, atol=TOLERANCE)
