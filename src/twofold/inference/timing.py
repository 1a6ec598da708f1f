"""Seconds of several things that are done in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


def in_turn(
    functions: Sequence[Callable[[], object]], repeats: int, device: torch.device | str = "cpu"
) -> list[list[float]]:
    """Return the seconds of each function in each of ``repeats`` rounds, A B A B …, after a round that is not timed."""
    for function in functions:
        function()
    rounds = [[timed(function, device) for function in functions] for _ in range(repeats)]
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


def timed(function: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Return the seconds of one call, with what it started on an accelerator."""
    finish = getattr(torch, torch.device(device).type).synchronize  # does nothing on a processor
    finish()
    start = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - start
