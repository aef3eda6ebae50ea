import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from jax_instructblip.training import run_lock
from jax_instructblip.training.run_lock import Owner, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from jax_instructblip.training.run_lock import RunLock

lock = RunLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


def test_a_folder_has_one_run_at_a_time_and_says_which(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    with pytest.raises(ValueError) as error:
        RunLock(tmp_path)
    said = f"in use by another run (process {process.pid} on {socket.gethostname()} since 20"
    assert said in str(error.value) and "config.workdir" in str(error.value)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    lock = RunLock(tmp_path)  # the killed one has left its file
    owner = json.loads((tmp_path / run_lock.FILE).read_text())
    assert owner["process"] == os.getpid()
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path)
    lock.release()
    lock.release()
    assert not os.listdir(tmp_path)
    RunLock(tmp_path).release()


def test_a_lock_whose_file_is_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """The one before removes the file after it was opened here: a third could make another."""
    flock, tries = run_lock.fcntl.flock, []

    def removed_first(*given):
        if not tries:
            (tmp_path / run_lock.FILE).unlink()
        tries.append(given)
        return flock(*given)

    monkeypatch.setattr(run_lock.fcntl, "flock", removed_first)
    lock = RunLock(tmp_path)
    assert len(tries) == 2
    with pytest.raises(ValueError, match="in use"):
        RunLock(tmp_path)
    lock.release()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    lock = RunLock(tmp_path)
    assert lock.problem == f"{tmp_path} cannot be locked (Operation not supported)"
    lock.release()
    assert not os.listdir(tmp_path)


def test_an_owner_is_written_and_read():
    owner = Owner.me()
    assert Owner.parse(owner.to_json()) == owner
    assert re.fullmatch(r"process \d+ on \S+ since [\d-]+ [\d:]+ \S+", str(owner))
    for text in ("", "{", "[1]", '{"host": 1}', b"\xff"):
        assert Owner.parse(text) is None
