"""Ports for processes that are to find each other."""

import contextlib
import random
import socket

_draw = random.SystemRandom()  # tests that run at the same time draw others


def free_port() -> int:
    """A port that is free, as the next one is, and stays so.

    It is below those that a system gives to outgoing connections: between the asking and the
    listening of a process that starts, one of these might be taken.
    """
    while True:
        port = _draw.randrange(20_000, 32_000)
        with (
            contextlib.suppress(OSError),
            socket.create_server(("", port)),
            socket.create_server(("", port + 1)),
        ):
            return port
