"""Pools of worker processes that end together with this process."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable


def pool(
    workers: int, prepare: Callable[[], None] | None = None
) -> concurrent.futures.ProcessPoolExecutor:
    """Returns an executor with `workers` processes, each of which first calls `prepare`.

    `prepare` must be picklable, such as a function of a module.

    The processes are spawned, because forked ones would inherit locks held by other threads. They
    ignore SIGTERM and SIGINT, since this process may still need them while it shuts down, and they
    exit when this process dies.
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
