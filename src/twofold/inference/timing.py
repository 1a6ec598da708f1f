"""Seconds of several things that are done in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def in_turn(
    functions: Sequence[Callable[[], object]], repeats: int, device: torch.device | str = "cpu"
) -> list[list[float]]:
    """Seconds of each function in each of ``repeats`` rounds, A B A B …, after a round that is not timed."""
    for function in functions:
        function()
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for i, function in enumerate(functions):
            seconds[i].append(timed(function, device))
    return seconds


def timed(function: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one call, with what it started on an accelerator."""
    _finish(device)
    start = time.perf_counter()
    function()
    _finish(device)
    return time.perf_counter() - start


def medians(seconds: Sequence[Sequence[float]]) -> list[float]:
    """The median of each."""
    return [statistics.median(one) for one in seconds]


def _finish(device: torch.device | str) -> None:
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize()
    elif kind == "mps":
        torch.mps.synchronize()
