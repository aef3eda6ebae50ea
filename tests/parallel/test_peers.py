"""Loss of one of several real processes, which only exchange messages here."""

import select
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.helpers.ports import free_port

# One process of three, which answers each line that it reads.
MEMBER = """
    import sys, time
    from jax_instructblip.parallel import peers
    from jax_instructblip.parallel.cluster import rendezvous
    from jax_instructblip.parallel.membership import Cluster

    port, index, limit = sys.argv[1:]
    time.time = lambda: 1e6 * float(index)  # the clocks of machines differ, as no one should mind
    cluster = Cluster(f"localhost:{port}", 3, int(index))
    watch = peers.Peers(
        rendezvous(cluster, 60.0), f"process {index} on here", float(limit)
    )
    peers.on_loss(lambda: print("finishing", flush=True))
    print("here", flush=True)
    for line in sys.stdin:
        if line == "end\\n":
            watch.close()
            sys.exit(0)
        if line == "barrier\\n":
            peers.barrier()
            print("met", flush=True)
        if line == "fail\\n":
            watch.fail("ValueError: the disk is full\\nreally")
            sys.exit(3)
"""


@pytest.fixture
def members(request):
    port, limit = free_port(), getattr(request, "param", 60.0)
    words = [sys.executable, "-c", textwrap.dedent(MEMBER), str(port)]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    started = [
        subprocess.Popen([*words, str(index), str(limit)], text=True, **pipes) for index in range(3)
    ]
    for process in started:
        assert process.stdout.readline() == "here\n"
    yield started
    for process in started:
        process.kill()
        process.communicate()


def ends(process):
    """Its exit status and what it said, when it ends by itself."""
    process.wait(timeout=30)
    return process.returncode, process.stdout.read(), process.stderr.read()


def order(process, word):
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_which_name_it(members, victim):
    began = time.monotonic()
    members[victim].send_signal(signal.SIGKILL)
    for index in {0, 1, 2} - {victim}:
        code, finished, said = ends(members[index])
        assert (code, finished) == (1, "finishing\n")
        where = "localhost" if victim == 0 else ""  # of process 0 its address is known
        assert f"error: process {victim} on {where}" in said
        assert "ended without a word" in said and "Start all processes again" in said
        assert f"process {index} on here cannot go on" in said
    assert time.monotonic() - began < 10


def test_a_process_that_fails_tells_the_others_why(members):
    order(members[2], "fail")
    assert ends(members[2])[0] == 3
    for index in (0, 1):
        code, _, said = ends(members[index])
        assert code == 1
        assert "error: process 2 on here ended: ValueError: the disk is full really\n" in said


@pytest.mark.parametrize("members", [2.0], indirect=True)
def test_a_silent_process_counts_as_lost(members):
    time.sleep(3.0)  # longer than the limit: they talk to each other
    assert [process.poll() for process in members] == [None] * 3
    members[1].send_signal(signal.SIGSTOP)
    for index in (0, 2):
        code, _, said = ends(members[index])
        assert code == 1 and "process 1 on" in said and "silent for 2 seconds" in said


def test_the_end_of_the_work_is_no_loss(members):
    for process in members:
        order(process, "end")
        time.sleep(0.5)
    assert [ends(process) for process in members] == [(0, "", "")] * 3


def test_they_meet_when_the_last_one_comes(members):
    for latest in (1, 0):
        for index in {0, 1, 2} - {latest}:
            order(members[index], "barrier")
        ready, _, _ = select.select([process.stdout for process in members], [], [], 1.0)
        assert not ready  # they wait
        order(members[latest], "barrier")
        assert [process.stdout.readline() for process in members] == ["met\n"] * 3
