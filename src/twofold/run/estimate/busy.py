"""Whether other programs disturb a measurement of time: what they take of the processors meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

ENOUGH = 0.9  # share of the threads that may be left without a word


@dataclass
class Busy:
    """What a measurement had of the machine."""

    processors: int  # of the machine, or those that this process may use
    threads: int  # of the computation
    wall: float = 0.0  # seconds
    own: float = 0.0  # seconds of processor that this process took
    others: float = 0.0  # processors that others took

    @property
    def left(self) -> float:
        """The processors that were left for this process."""
        return max(self.processors - self.others, 0.0)

    @property
    def disturbed(self) -> bool:
        """Whether fewer were left than it would have used."""
        return self.left < ENOUGH * min(self.threads, self.processors)

    @property
    def shortening(self) -> float:
        """The share of its time that its own work took, spread over all threads: nearer to what it takes on a free machine.

        It is no bound: threads that wait for one another take processor time, too, and some work goes on one thread alone.
        """
        return min(self.own / (self.wall * self.threads), 1.0) if self.wall and self.own else 1.0


@contextmanager
def watch_processors() -> Iterator[Busy]:
    """Measure what other programs take of the processors within the block; the result is filled at its end."""
    busy = Busy(_processors(), torch.get_num_threads())
    wall, own, whole = time.perf_counter(), time.process_time(), _used()
    yield busy
    busy.wall, busy.own = time.perf_counter() - wall, time.process_time() - own
    if busy.wall > 0:
        busy.others = max(_used() - whole - busy.own, 0.0) / busy.wall


def _processors() -> int:
    """Return how many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return (psutil.cpu_count() or 1) if affinity is None else len(affinity(0))


def _used() -> float:
    """Return the seconds that all processors together have worked since the machine began, by any program or its host."""
    times = psutil.cpu_times()
    return float(
        times.user + times.system + sum(getattr(times, kind, 0.0) for kind in ("nice", "irq", "softirq", "steal"))
    )
