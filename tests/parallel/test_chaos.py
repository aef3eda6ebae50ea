"""Processes of a run that are killed at random moments, until the run has ended all the same."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.training.checkpoints import Checkpoints
from jax_instructblip.training.metrics import read_metrics
from tests.micro import compile_cache, write_base, write_data
from tests.parallel.test_processes import ended, final, losses, start, words

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
EVERY = 2  # steps between checkpoints
END_LIMIT = 60.0  # seconds in which a process that lost another one ends
SAVING = re.compile(r"\.\d+\.partial-")  # a checkpoint that is being written


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    with compile_cache(folder / "compiled"):
        yield write_base(folder / "base"), write_data(folder / "data")


class Chaos:
    """A run of two processes in `workdir`, of which one is killed again and again."""

    def __init__(self, files, workdir, steps, seed):
        fields = {"train.steps": steps, "checkpoints.every": EVERY, "checkpoints.keep": 2}
        self.words = [*words(files, workdir, **fields), "--wait_limit", "60"]
        self.workdir, self.folder = workdir, workdir / "checkpoints"
        self.steps, self.draw = steps, random.Random(seed)

    def committed(self):
        return Checkpoints(self.folder).steps()

    def hidden(self):
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return [name for name in names if SAVING.match(name)]

    def strike(self, moment):
        """Starts the run, kills one process at such a moment; what is to be noted of it."""
        before = self.committed()
        processes = start(2, 1, self.words)
        self.wait(processes, moment, before[-1] if before else 0)
        if any(process.poll() is not None for process in processes):
            said = "\n".join(said for said, _ in ended(processes))
            raise AssertionError(f"ended by itself, waiting for {moment}:\n{said}")
        victim = self.draw.randrange(2)
        saved, half = self.committed(), self.hidden()
        processes[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        found = ended(processes)
        seconds = time.monotonic() - began
        said, code = found[1 - victim]
        assert seconds < END_LIMIT and code == 1, said
        assert re.search(f"process {victim} on .* ended without a word|process 0 left", said), said
        assert "Traceback" not in said
        assert set(saved[-1:]) <= set(self.committed()), "a committed step is lost"
        for step in self.committed():  # every hash is compared
            for part in ("trainable", "optimizer"):
                checkpoint.read_tree(self.folder / str(step) / part)
        return {
            "moment": moment,
            "killed": victim,
            "a_save_was_going_on": bool(half),
            "newest_checkpoint": (self.committed() or [0])[-1],
            "the_other_ended_after_seconds": round(seconds, 2),
        }

    def wait(self, processes, moment, step):
        wanted, deadline = step + self.draw.randint(1, 2 * EVERY), time.monotonic() + 300
        if moment == "start":
            deadline = time.monotonic() + self.draw.uniform(0.0, 8.0)
        old = set(self.hidden())
        while all(process.poll() is None for process in processes):
            lines = read_metrics(self.workdir)
            reached = lines[-1]["step"] if lines else 0
            if moment == "step" and reached > step and reached >= wanted:
                break
            if moment == "save" and set(self.hidden()) - old:
                time.sleep(self.draw.uniform(0.0, 0.3))
                break
            if time.monotonic() > deadline:
                assert moment == "start"
                break
            time.sleep(0.005)

    def finish(self):
        found = ended(start(2, 1, self.words))
        assert [code for _, code in found] == [0, 0], "\n".join(said for said, _ in found)
        assert not self.hidden() or self.committed()[-1] == self.steps
        return losses(self.workdir), final(self.workdir, self.steps)


def run_chaos(files, folder, steps, moments, seed):
    unbroken = Chaos(files, folder / "unbroken", steps, seed).finish()
    chaos = Chaos(files, folder / "chaos", steps, seed)
    notes = []
    for number, moment in enumerate(moments):
        notes.append(chaos.strike(moment))
        print(number + 1, notes[-1], flush=True)
    curve, leaves = chaos.finish()
    np.testing.assert_array_equal(curve, unbroken[0])
    assert leaves.keys() == unbroken[1].keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, unbroken[1][path], err_msg=path)
    return notes


def test_killed_while_a_step_and_while_a_save_goes_on(files, tmp_path):
    notes = run_chaos(files, tmp_path, 12, ["step", "save"], seed=1)
    assert notes[1]["a_save_was_going_on"] or notes[1]["newest_checkpoint"] > 0


@pytest.mark.full
def test_killed_twenty_times_at_random_moments(files, tmp_path):
    seed = int(os.environ.get("JAX_INSTRUCTBLIP_CHAOS", "0"))
    draw = random.Random(seed)
    moments = [draw.choice(["start", "step", "step", "save", "save"]) for _ in range(20)]
    began = time.monotonic()
    notes = run_chaos(files, tmp_path, 150, moments, seed)
    result = {
        "what": "2 gloo processes, one killed (kill -9) 20 times; then the run is ended",
        "seed": seed,
        "steps": 150,
        "checkpoint_every": EVERY,
        "final_parameters_equal_an_unbroken_run_bit_for_bit": True,
        "committed_steps_lost": 0,
        "unreadable_checkpoints": 0,
        "seconds": round(time.monotonic() - began),
        "kills": notes,
    }
    (RESULTS / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
