"""Processes that work for this one: fresh ones, which end when it does."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable


def pool(
    workers: int, prepare: Callable[[], None] | None = None
) -> concurrent.futures.ProcessPoolExecutor:
    """An executor of `workers` processes, each of which calls `prepare` first.

    They are fresh (a forked one would inherit locks of whatever threads run here), leave SIGTERM
    and SIGINT to this process, which may still need them, and end when it is killed.
    """
    return concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(prepare,),
    )


def _begin(prepare: Callable[[], None] | None) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if prepare is not None:
        prepare()
