"""A progress line on stderr with rate and remaining time, for work of more than two seconds."""

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

QUIET_SECONDS = 2.0  # nothing is printed before this
TTY_SECONDS = 0.2  # between redraws of the line on a terminal
LOG_SECONDS = 10.0  # between lines in a log file
RATE_SECONDS = 30.0  # the rate is measured over so long: earlier work may have another pace


class Progress:
    """Prints `label: done/total unit, rate, time left` to stderr during work.

    On a terminal the line is redrawn in place; elsewhere a new line is printed every ten seconds.
    Work of less than two seconds prints nothing. Rate and time left are based on the last 30
    seconds; the final line has the mean rate.

        with Progress(len(paths), "opening images", "images") as progress:
            for path in paths:
                ...
                progress.update()
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str = "items",
        *,
        done: int = 0,
        compiles: bool = False,
        silent: bool = False,
    ):
        """Starts the clock.

        Args:
          total: all units of work, including `done`; None if unknown.
          label: a name of the work, at the start of the line.
          unit: the unit of work, such as "images".
          done: units that were finished earlier, for example before a restart.
          compiles: the first update includes compilation, so it is excluded from the rate.
          silent: print nothing; for all but one of several processes with the same work.
        """
        self._total, self._label, self._unit = total, label, unit
        self._first, self._done, self._note = done, done, ""
        self._start = time.monotonic()
        self._marks = collections.deque[tuple[float, int]]()  # time, units done by then
        if not compiles:
            self._marks.append((self._start, done))
        self._due = math.inf if silent else self._start + QUIET_SECONDS
        self._printed = False

    def update(self, done: int = 1, note: str = "") -> None:
        """Adds `done` finished units; `note`, such as the current loss, ends the line."""
        self._done += done
        self._note = note
        now = time.monotonic()
        self._mark(now)
        if now >= self._due:
            tty = sys.stderr.isatty()
            self._print(now, tty)
            self._due = now + (TTY_SECONDS if tty else LOG_SECONDS)

    def close(self) -> None:
        """Prints the final line with the time taken, if any line has been printed before."""
        if self._printed:
            tty = sys.stderr.isatty()
            self._print(time.monotonic(), tty, last=True)
            if tty:
                print(file=sys.stderr, flush=True)
            self._printed = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mark(self, now: float) -> None:
        """Records the time and the units done; drops records that are too old for the rate."""
        if len(self._marks) > 1 and now - self._marks[-2][0] < TTY_SECONDS:
            self._marks.pop()  # many quick updates share one record
        self._marks.append((now, self._done))
        while len(self._marks) > 2 and now - self._marks[1][0] >= RATE_SECONDS:
            self._marks.popleft()

    def _print(self, now: float, tty: bool, last: bool = False) -> None:
        amount = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
        line = f"{self._label}: {amount} {self._unit}"
        if last:
            seconds = now - self._start
            rate = (self._done - self._first) / max(seconds, 1e-9)
            line += f", {_rate(rate)}, took {duration(seconds)}"
        elif len(self._marks) > 1:  # else the only time known includes compilation
            before, done = self._marks[0]
            rate = (self._marks[-1][1] - done) / max(self._marks[-1][0] - before, 1e-9)
            line += f", {_rate(rate)}"
            if self._total is not None and rate > 0:
                line += f", {duration(max(self._total - self._done, 0) / rate)} left"
        if self._note:
            line += f", {self._note}"
        # "\x1b[K" clears what a longer line before left behind.
        print(
            f"\r{line}\x1b[K" if tty else line, end="" if tty else "\n", file=sys.stderr, flush=True
        )
        self._printed = True


@contextlib.contextmanager
def count_bytes(total: int, label: str) -> Iterator[Callable[..., None]]:
    """Shows the progress of `total` bytes in MB; yields the function `count(size, note="")`.

    Call it after each piece with its number of bytes; `note` is as in `Progress.update`.
    """
    with Progress(round(total / 1e6), label, "MB") as progress:
        done = 0

        def count(size: int, note: str = "") -> None:
            nonlocal done
            done, before = done + size, done
            progress.update(round(done / 1e6) - round(before / 1e6), note)

        yield count


def duration(seconds: float) -> str:
    """Formats seconds for people: `8s`, `3m20s`, `2h05m`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def _rate(rate: float) -> str:
    return f"{rate:.1f}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.1f}s each"
