"""A run of two processes, of which one is killed at random moments."""

import os
import random
import re
import signal
import time

from jax_instructblip import checkpoint
from jax_instructblip.training.checkpoints import Checkpoints
from jax_instructblip.training.metrics import read_metrics

EVERY = 2  # steps between checkpoints
END_LIMIT = 60.0  # seconds in which a process that lost another one ends
START_LIMIT = 300.0  # the same where they have not found together yet
WAIT_LIMIT = 300.0  # seconds until the moment of a kill has come
SAVING = re.compile(r"\.\d+\.part")  # a checkpoint that is being written
FIELDS = {"checkpoints.every": EVERY, "checkpoints.keep": 2}


class RandomKills:
    """`start()` begins the run in `workdir`, `ended(processes)` waits for it."""

    def __init__(self, start, ended, workdir, seed):
        self.start, self.ended, self.draw = start, ended, random.Random(seed)
        self.workdir, self.folder = workdir, workdir / "checkpoints"

    def committed(self):
        return Checkpoints(self.folder).steps()

    def hidden(self):
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return {name for name in names if SAVING.match(name)}

    def strike(self, moment):
        """Starts the run, kills one process at such a moment; what is to be noted of it."""
        before = self.committed()
        processes = self.start()
        self.wait(processes, moment, before[-1] if before else 0)
        if any(process.poll() is not None for process in processes):
            said = "\n".join(said for said, _ in self.ended(processes))
            raise AssertionError(f"ended by itself, waiting for {moment}:\n{said}")
        victim = self.draw.randrange(2)
        saved, half = self.committed(), self.hidden()
        processes[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        found = self.ended(processes)
        seconds = time.monotonic() - began
        said, code = found[1 - victim]
        # Before they have found together nobody knows of the other, but that it does not come.
        limit = END_LIMIT if moment != "start" else START_LIMIT
        assert seconds < limit and code == 1, said
        assert "ended without a word" in said or moment == "start", said
        assert "Traceback" not in said
        now = self.committed()
        assert set(saved[-1:]) <= set(now), "a committed step is lost"
        for step in now:  # every hash is compared
            for part in ("trainable", "optimizer"):
                checkpoint.read_tree(self.folder / str(step) / part)
        return {
            "moment": moment,
            "killed_process": victim,
            "a_save_was_going_on": bool(half),
            "newest_checkpoint_before": (saved or [0])[-1],
            "newest_checkpoint_after": (now or [0])[-1],
            "the_other_ended_after_seconds": round(seconds, 2),
            "it_said": next((line for line in said.splitlines() if "error:" in line), ""),
        }

    def wait(self, processes, moment, step):
        """Returns when the moment has come, or a process has ended."""
        wanted, limit = step + self.draw.randint(1, 2 * EVERY), time.monotonic() + WAIT_LIMIT
        strike = time.monotonic() + self.draw.uniform(0.0, 8.0)
        old, began = self.hidden(), time.time()
        while all(process.poll() is None for process in processes):
            # What the run before has written of later steps stands there until they are made again.
            lines = [line for line in read_metrics(self.workdir) if line["time"] > began]
            if moment == "start" and time.monotonic() > strike:
                return
            if moment == "step" and lines and lines[-1]["step"] >= wanted:
                return
            if moment == "save" and self.hidden() - old:
                time.sleep(self.draw.uniform(0.0, 0.3))
                return
            assert time.monotonic() < limit, f"no {moment} in {WAIT_LIMIT} seconds"
            time.sleep(0.005)
