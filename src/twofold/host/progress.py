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

LINE_SECONDS = 15.0  # how often a log gets a line
PHRASE: ContextVar[Callable[[str], str]] = ContextVar("phrase", default=str)  # how sentences name settings


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
    start = last = time.monotonic()
    began = done

    def tick(amount: int = 1) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= LINE_SECONDS and done < total:
            last = now
            left = (now - start) / max(done - began, 1e-9) * (total - done)
            print(f"{title}: {done}/{total} {unit}, {left:.0f} s left".replace(" ,", ","), file=sys.stderr, flush=True)

    print(f"{title} …", file=sys.stderr, flush=True)
    yield tick
    print(f"{title}: done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Tell the user something, on standard error."""
    print(PHRASE.get()(text), file=sys.stderr, flush=True)
