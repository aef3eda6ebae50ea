"""Counts the programs that XLA compiles while a block runs."""

import contextlib
from collections.abc import Iterator

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def count_compiles() -> Iterator[list[float]]:
    """Yields a list that grows by the seconds of each compilation: `len` of it is their number."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == _EVENT:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
