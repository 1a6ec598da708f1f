"""Progress of long work: a bar with the time left on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 15.0  # how often a stage that goes on gets a line in a log
REST_SECONDS = 10.0  # for which a log takes one more line, once it has had as many as it takes at once
AT_ONCE = 30
PHRASE: ContextVar[Callable[[str], str]] = ContextVar("phrase", default=str)  # how sentences name settings


class Log:
    """Lines where no terminal is: some at once, then one in ten seconds, so that many short stages do not fill a log."""

    def __init__(self) -> None:
        self._room, self._last = float(AT_ONCE), time.monotonic()

    def line(self, text: str, *, needed: bool = False) -> None:
        """Write a line if there is room for it, or if it is needed."""
        now = time.monotonic()
        self._room = min(self._room + (now - self._last) / REST_SECONDS, float(AT_ONCE))
        self._last = now
        if self._room >= 1 or needed:
            self._room -= 1
            print(text, file=sys.stderr, flush=True)


LOG: ContextVar[Log] = ContextVar("log", default=Log())  # noqa: B039 (one for a process that sets none)


class Tick(Protocol):
    """Says that some of the work is done."""

    def __call__(self, amount: int = 1) -> None: ...


@contextmanager
def progress(title: str, total: int, *, done: int = 0, unit: str = "", quiet: bool = False) -> Iterator[Tick]:
    """Show the progress of ``total`` units of work on standard error; yield the function to call after each.

    >>> with progress("Decomposing", total=3, quiet=True) as tick:
    ...     for _ in range(3):
    ...         tick()
    """
    if quiet:
        yield lambda amount=1: None
        return
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda amount=1: bar.advance(task, amount)
        return
    log, start = LOG.get(), time.monotonic()
    began, last = done, start

    def tick(amount: int = 1) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= LINE_SECONDS and done < total:
            last = now
            left = (now - start) / max(done - began, 1e-9) * (total - done)
            log.line(f"{title}: {done}/{total} {unit}, {duration(left)} left".replace(" ,", ","))

    log.line(f"{title} …")
    yield tick
    seconds = time.monotonic() - start
    log.line(f"{title}: done in {duration(seconds)}", needed=seconds >= LINE_SECONDS)


def duration(seconds: float, gap: str = " ") -> str:
    """Write a time span: in seconds up to two minutes, then in minutes, then in hours.

    >>> duration(0.034), duration(14.49), duration(300), duration(3700)
    ('0.03 s', '14.5 s', '5 min', '1 h 2 min')

    Args:
        gap: between a number and its unit.
    """
    if seconds < 1:
        return f"{seconds:.2f}{gap}s"
    if seconds < 119.95:
        return f"{seconds:.1f}{gap}s"
    minutes = round(seconds / 60)
    return f"{minutes}{gap}min" if minutes < 60 else f"{minutes // 60}{gap}h {minutes % 60}{gap}min"


def say(text: str) -> None:
    """Tell the user something, on standard error."""
    print(PHRASE.get()(text), file=sys.stderr, flush=True)
