"""Detection of a lost process: the other processes of its run notice, and end.

A collective waits for all processes, so it would wait for a dead one forever, or for minutes.
Therefore the connections of the rendezvous stay open, and a thread in each process listens:

    process 1 --+
    process 2 --+-- process 0       each line: both ends say regularly that they are alive, and
    process 3 --+                   process 0 tells the others of a lost process

A killed process is noticed at once, because its connection closes. A machine that lost its power or
its network is noticed when it has been silent for a while.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping

Lines = Mapping[int, tuple[socket.socket, str]]  # number of a process -> (connection, its host)

LIMIT = 100.0  # seconds of silence after which a process counts as lost
FINISH_LIMIT = 600.0  # seconds that callbacks of `on_loss` may take to end their writes
SETTLE_SECONDS = 2.0  # an error is put down to a lost process if its loss shows within this time
_ALIVE, _BYE, _LOST, _HERE = b"alive", b"bye", b"lost", b"here"

_callbacks: list[Callable[[], None]] = []
_watching: "list[Peers]" = []


def on_loss(callback: Callable[[], None]) -> None:
    """Registers a function that is called before this process ends because another one was lost.

    It should end writes that are in progress, such as that of a checkpoint.
    """
    _callbacks.append(callback)


def barrier() -> None:
    """Returns when every process of the run has called this function; at once if there is only one.

    There is no time limit. The first collective of a run has one: gloo, on CPUs, waits 30 seconds,
    and the compile times of two machines may differ by more. A call before that collective helps.
    """
    for watch in _watching:
        watch.barrier()


class Peers:
    """Watches the other processes of a run from its construction until `close` or `fail`."""

    def __init__(self, lines: Lines, me: str, limit: float = LIMIT):
        """Starts the watch over `lines` (from `cluster.rendezvous`), which it closes at the end.

        `me` is the name of this process in messages to the others; a process that is silent for
        `limit` seconds counts as lost.
        """
        self._lines, self._me, self._limit = dict(lines), me, limit
        self._heard = dict.fromkeys(self._lines, time.monotonic())
        self._partial = dict.fromkeys(self._lines, b"")
        self._lost = threading.Event()
        self._closed = threading.Event()
        self._sending = threading.Lock()
        self._arrived = dict.fromkeys(self._lines, 0)
        self._barriers, self._arrival = 0, threading.Condition()
        for connection, _ in self._lines.values():
            connection.settimeout(5.0)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()
        _watching.append(self)

    def barrier(self) -> None:
        """Waits until every process of the run has called this method as often as this one."""
        self._barriers += 1
        gathers = 0 not in self._lines  # process 0 hears all the others, and then tells them
        if not gathers:
            self._broadcast(_HERE)
        with self._arrival:
            self._arrival.wait_for(lambda: min(self._arrived.values()) >= self._barriers)
        if gathers:
            self._broadcast(_HERE)

    def close(self) -> None:
        """Ends this process's watch and closes its connections, after the last `barrier` of a run.

        It does not wait for the others, who do not take this process for lost.
        """
        self._closed.set()
        self._broadcast(_BYE)
        self._thread.join()
        _watching.remove(self)
        for connection, _ in self._lines.values():
            connection.close()

    def fail(self, reason: str) -> None:
        """Tells the other processes that this one ends, and for which reason.

        Does not return if this process failed because another one was lost: the watching thread
        then reports that loss and ends the process.
        """
        if self._lost.wait(SETTLE_SECONDS):
            self._thread.join()
        self._closed.set()  # from now on the end of another process is not reported
        self._broadcast(_LOST + f" {self._me} ended: {reason}".encode("utf-8", "backslashreplace"))
        self._thread.join()

    def _watch(self) -> None:
        beat = min(self._limit / 4, 5.0)
        with selectors.DefaultSelector() as selector:
            for index, (connection, _) in self._lines.items():
                selector.register(connection, selectors.EVENT_READ, index)
            said = time.monotonic()
            while not self._closed.is_set():
                for key, _ in selector.select(min(beat, 0.2)):
                    if not self._receive(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - said > beat:
                    self._broadcast(_ALIVE)
                    said = now
                for index, heard in self._heard.items():
                    if now - heard > self._limit:
                        silent = f"has been silent for {self._limit:g} seconds"
                        self._end(f"{self._name(index)} {silent}")

    def _receive(self, index: int) -> bool:
        """Reads what process `index` has sent; returns False if nothing more will come."""
        try:
            data = self._lines[index][0].recv(65_536)
        except TimeoutError:
            return True
        except OSError:
            data = b""
        self._heard[index] = time.monotonic()
        *words, self._partial[index] = (self._partial[index] + data).split(b"\n")
        for word in words:
            if word.startswith(_LOST):
                self._end(word.removeprefix(_LOST).strip().decode(errors="replace"))
            if word == _HERE:
                with self._arrival:
                    self._arrived[index] += 1
                    self._arrival.notify_all()
            if word == _BYE:
                del self._heard[index]
                return False
        if not data:
            self._end(f"{self._name(index)} ended without a word: was it killed?")
        return bool(data)

    def _end(self, loss: str) -> None:
        """Reports `loss` and ends this process, which cannot go on without the lost one.

        Does nothing if this process has closed its watch.
        """
        if self._closed.is_set():
            return
        self._lost.set()
        self._broadcast(_LOST + b" " + loss.encode("utf-8", "backslashreplace"))
        print(
            f"\nerror: {loss}\n{self._me} cannot go on without it and ends. Start all processes "
            "again: they go on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        finishing = threading.Thread(target=_finish, daemon=True)
        finishing.start()
        finishing.join(FINISH_LIMIT)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(1)  # the main thread may be waiting for the lost process, where nothing stops it

    def _broadcast(self, word: bytes) -> None:
        with self._sending:
            for connection, _ in self._lines.values():
                with contextlib.suppress(OSError):  # the other end has gone: the watch will notice
                    connection.sendall(b"%s\n" % word.replace(b"\n", b" "))

    def _name(self, index: int) -> str:
        return f"process {index} on {self._lines[index][1]}"


def _finish() -> None:
    for callback in _callbacks:
        with contextlib.suppress(Exception):
            callback()
