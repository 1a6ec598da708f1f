"""The progress of a training: steps, the loss, and the time left; a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from twofold.host.progress import LINE_SECONDS, LOG, duration


class LossBar:
    """Shown on standard error, unless it is quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Progress | None = None
        self._words = ""

    def begin(self, total: int, done: int) -> None:
        """Start at a step of ``total``."""
        self._total, self._began = total, done
        self._start = self._last = time.monotonic()
        if self.quiet:
            return
        if not sys.stderr.isatty():
            LOG.get().line(f"Training … step {done} of {total}")
            return
        self._bar = Progress(
            TextColumn("Training"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps{task.fields[words]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=total, completed=done, words="")
        self._bar.start()

    def show(self, step: int, loss: float | None, held_out: float | None) -> None:
        """Show that a step is done, or that the held-out rows were measured."""
        if held_out is not None:
            self._words = f", held-out loss {held_out:.4f}"
        words = ("" if loss is None else f", loss {loss:.4f}") + self._words
        if self._bar is not None:
            self._bar.update(self._task, completed=step, words=words)
            return
        now = time.monotonic()
        if self.quiet or step == 0 or step <= self._began or (now - self._last < LINE_SECONDS and held_out is None):
            return
        self._last = now
        left = (now - self._start) / (step - self._began) * (self._total - step)
        LOG.get().line(f"Training: {step}/{self._total} steps{words}, {duration(left)} left")

    def end(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
