"""The rendezvous, and preemption; real runs are in test_processes.py."""

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from jax_instructblip.parallel import cluster
from jax_instructblip.parallel.membership import Cluster, ClusterError
from tests.helpers.ports import free_port


@pytest.fixture
def address():
    """A coordinator whose port, and the next one, are free."""
    return f"localhost:{free_port()}"


def call(clusters, limit):
    """With whom each process of `clusters` stays connected, or the error."""

    def join(own):
        try:
            with contextlib.ExitStack() as stack:
                lines = cluster.rendezvous(own, limit)
                for connection, _ in lines.values():
                    stack.enter_context(connection)
                return sorted(lines)
        except ClusterError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(clusters)) as pool:
        return list(pool.map(join, clusters))


def test_all_are_here(address):
    assert call([Cluster(address, 4, index) for index in (2, 3, 1, 0)], 20.0) == [
        [0],
        [0],
        [0],
        [1, 2, 3],
    ]


def test_absent_processes_are_named_to_all_that_are_here(address):
    began = time.monotonic()
    found = call([Cluster(address, 5, index) for index in (0, 3, 1)], 1.5)
    assert time.monotonic() - began < 8
    assert len(set(found)) == 1
    assert "3 of 5 processes are here, absent: 2, 4; here: 0 on" in found[0]


def test_without_process_0_its_address_is_named(address):
    (said,) = call([Cluster(address, 2, 1)], 0.6)
    port = int(address.partition(":")[2]) + 1
    assert f"nobody answers at localhost:{port}" in said and "absent: 0" in said


def test_a_stranger_in_the_place_of_process_0_is_named(address):
    port = int(address.partition(":")[2]) + 1
    with (
        socket.create_server(("", port)) as server,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        waiting = pool.submit(call, [Cluster(address, 2, 1)], 1.0)
        while not waiting.done():
            server.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                with server.accept()[0] as visitor:
                    visitor.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        (said,) = waiting.result()
    assert "process 1: somebody else answers ('HTTP/1.1 400 Bad Request') at localhost:" in said


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        ([(3, 0), (3, 1), (3, 1)], "two processes say that they are process 1"),
        ([(3, 0), (4, 1)], "process 1 on .* was told of 4 processes, not 3"),
    ],
)
def test_processes_that_were_started_differently(address, clusters, message):
    found = call([Cluster(address, *each) for each in clusters], 10.0)
    assert all(re.search(message, said) for said in found)


def test_strangers_at_the_port_do_not_count(address):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(call, [Cluster(address, 2, 0)], 20.0)
        while True:
            try:
                host, port = Cluster(address, 2, 0).rendezvous_address()
                with socket.create_connection((host, port), timeout=5) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        assert call([Cluster(address, 2, 1)], 20.0) == [[0]]
        assert waiting.result() == [[1]]


def test_a_port_in_use_is_named(address):
    port = int(address.partition(":")[2]) + 1
    with socket.create_server(("", port)):
        with pytest.raises(ClusterError, match=f"port {port} of .* cannot be used"):
            cluster.rendezvous(Cluster(address, 2, 0), 1.0)


def test_sigterm_is_an_order_to_stop_and_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    order = cluster.Preemption()
    assert not order.reached(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert order.reached(2) and order.reached(3)
    order.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_ctrl_c_is_an_order_to_stop_the_second_interrupts(capfd):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        order = cluster.Preemption()
        os.kill(os.getpid(), signal.SIGINT)
        assert order.reached(1)
        assert "Ctrl-C: saving, then ending. Once more: ending now" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        order.close()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_hang_shows_its_stack_and_a_step_puts_it_off():
    script = """
        import time
        from jax_instructblip.parallel.cluster import Watchdog
        def stuck():
            time.sleep(1.5)
        watchdog = Watchdog(0.5)
        for _ in range(4):
            watchdog.alive()
            time.sleep(0.2)
        print("so far nothing", flush=True)
        stuck()
        watchdog.close()
        time.sleep(0.8)
    """
    made = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert made.stdout == "so far nothing\n"
    assert made.stderr.count("Timeout (") == 1 and "in stuck" in made.stderr
